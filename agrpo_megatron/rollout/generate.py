"""Completions of problems, sampled by all ranks and graded; and what is shown of them."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.snapshot import Interrupted
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.pipeline import RolloutForward
from agrpo_megatron.resilience.stop import Stopped
from agrpo_megatron.rollout.session import Session, encode_prompts, sample_prompts
from agrpo_megatron.tasks.base import Split, task_prompts
from agrpo_megatron.tasks.grading import Call
from agrpo_megatron.trajectories import join, moved
from agrpo_megatron.types import Answers, Problem, Prompt, Reward, Trajectory


def answer(
    session: Session,
    network: Network,
    problems: Sequence[Problem],
    rollout_ids: Tensor,
    *,
    sampling: SamplingSettings,
    weights_version: int = 0,
    split: Split = "train",
    kept: str | None = None,
) -> Answers:
    """Complete and grade problems; called by every rank, data-parallel ranks share the work.

    Each completion is graded once, on the first rank of the replica that wrote it. A grader with
    workers begins with a completion as soon as it is written, while others still are.

    Args:
        split: train gives prompts and rewards of training, eval those of evaluation.
        kept: names the file with what was sampled so far, in a run that can be stopped.

    Returns:
        In `seconds`: time/rollout of sampling; time/reward from there until all have graded;
        time/reward_hidden, in which workers graded while this rank sampled.

    Raises:
        Stopped: the ranks agreed to stop; what was sampled is kept.
    """
    started, grader, is_training = time.perf_counter(), session.grader, split == "train"
    ranks, busy = network.ranks, grader.busy
    prompts = encode_prompts(session, task_prompts(session.task, problems, split=split))
    by_length = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    mine = by_length[ranks.data.rank :: ranks.data.size]
    hand_in = _HandIn(session, [problems[place] for place in mine], split)
    is_beside = ranks.speaks_for_replica and grader.has_workers
    with session.sections("rollout" if is_training else "evaluation"):
        trajectory, forward = _sample_or_stop(
            session,
            network,
            [prompts[place] for place in mine],
            rollout_ids[mine],
            kept=kept,
            sampling=sampling,
            weights_version=weights_version,
            ended=hand_in if is_beside else None,
        )
    sampled = time.perf_counter()
    with session.sections("reward" if is_training else "evaluation"):
        part = None
        if ranks.speaks_for_replica:
            if not is_beside:
                hand_in(list(range(len(mine))), trajectory.tokens)
            rewards = hand_in.rewards()
            part = (mine, moved(trajectory, "cpu"), rewards, forward.tokens, forward.slots.bubble)
        waited = time.perf_counter() - sampled
        parts = _from_replicas(part)
    seconds = {"time/rollout": sampled - started, "time/reward": time.perf_counter() - sampled}
    if is_beside:
        seconds["time/reward_hidden"] = max(0.0, grader.busy - busy - waited)
    return _joined(parts, ranks.device, seconds)


class _HandIn:
    """Hands a replica's completions to the grader as they end."""

    def __init__(self, session: Session, problems: Sequence[Problem], split: Split):
        self._session, self._problems = session, problems
        self._split: Split = split
        self._parts: list[tuple[list[int], Future[list[Reward]]]] = []

    def __call__(self, rows: list[int], tokens: Tensor) -> None:
        """Let the grader begin on completions [n, C] of some of the problems."""
        chosen = [self._problems[row] for row in rows]
        calls = to_grade(self._session, chosen, tokens, split=self._split)
        self._parts.append((rows, self._session.grader.start(calls)))

    def rewards(self) -> list[Reward]:
        """Wait for the rewards of all problems, in their order."""
        graded = {
            row: reward
            for rows, future in self._parts
            for row, reward in zip(rows, future.result(), strict=True)
        }
        return [graded[row] for row in range(len(self._problems))]


def _sample_or_stop(
    session: Session,
    network: Network,
    prompts: Sequence[Tensor],
    rollout_ids: Tensor,
    *,
    kept: str | None,
    **options: Any,
) -> tuple[Trajectory, RolloutForward]:
    """Sample this replica's share; where any replica ends early, all ranks stop."""
    if kept is None or session.bank is None:
        return sample_prompts(session, network, prompts, rollout_ids, **options)
    interruption = session.bank.partial(kept, rollout_ids, ranks=network.ranks, stop=session.stop)
    sampled = None
    with suppress(Interrupted):
        sampled = sample_prompts(
            session, network, prompts, rollout_ids, interruption=interruption, **options
        )
    interruption.close()
    reasons: list[str | None] = [None] * session.ranks.world_size
    dist.all_gather_object(reasons, None if sampled is not None else session.stop.reason or "")
    said = [reason for reason in reasons if reason is not None]
    if said:
        raise Stopped(max(said))
    assert sampled is not None
    return sampled


def _joined(parts: list[tuple], device: torch.device, seconds: dict[str, float]) -> Answers:
    """Put what the replicas did into the order of the problems."""
    places, trajectories, rewards, tokens, bubbles = zip(*parts, strict=True)
    order = torch.tensor([place for part in places for place in part]).argsort()
    graded = [reward for part in rewards for reward in part]
    return Answers(
        moved(join(trajectories, order), device),
        [graded[i] for i in order.tolist()],
        sum(tokens),
        sum(bubbles) / len(bubbles),
        seconds,
    )


def _from_replicas(part: tuple | None) -> list[tuple]:
    """Return the parts of all replicas on every rank; those that speak for none pass None."""
    parts: list[tuple | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [part for part in parts if part is not None]


def to_grade(
    session: Session, problems: Sequence[Problem], tokens: Tensor, *, split: Split
) -> list[Call]:
    """Return what the grader takes: completions [n, C] as text, in evaluation also as they are."""
    decode, decode_raw = session.tokenizer.decode, session.tokenizer.decode_raw
    return [
        Call(problem, decode(ids), decode_raw(ids) if split == "eval" else None)
        for problem, ids in zip(problems, tokens.tolist(), strict=True)
    ]


def sample_records(
    session: Session, problems: Sequence[Problem], answers: Answers, *, split: Split
) -> list[dict]:
    """Describe the first completions for samples.jsonl, `logging.samples` of them."""
    records, trajectory = [], answers.trajectory
    chosen = problems[: session.settings.logging.samples]
    prompts = task_prompts(session.task, chosen, split=split)
    for row, prompt in enumerate(prompts):
        ids = trajectory.tokens[row].tolist()
        records.append(
            {
                "prompt": shown_prompt(prompt),
                "completion": session.tokenizer.decode(ids),
                "pieces": session.tokenizer.pieces(ids),
                "unmask_step": trajectory.unmask_step[row].tolist(),
                "num_steps": int(trajectory.num_steps[row]),
                "reward": answers.rewards[row].score,
                "correct": answers.rewards[row].correct,
                "solution": problems[row].solution,
            }
        )
    return records


def shown_prompt(prompt: Prompt) -> str:
    """Return a prompt as people read it: the last message of a chat, and the prefill."""
    return prompt if isinstance(prompt, str) else prompt.messages[-1].content + prompt.prefill
