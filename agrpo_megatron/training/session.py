"""What the loops share: settings, ranks, task, tokenizer and log; and how a network samples."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.diffusion.sampler import SamplerContext, sample
from agrpo_megatron.diffusion.trajectories import join, moved
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.pipeline import RolloutForward, make_forward
from agrpo_megatron.megatron.ranks import Ranks
from agrpo_megatron.settings import SamplingSettings, Settings
from agrpo_megatron.tasks import Task
from agrpo_megatron.tasks.base import Split, task_prompts
from agrpo_megatron.tasks.grading import Call, Grader
from agrpo_megatron.tokenizer import Tokenizer
from agrpo_megatron.training.log import RunLog
from agrpo_megatron.types import Problem, Prompt, Reward, Trajectory

EVALUATION_IDS = 1 << 40  # noise indices of evaluation, far from those of training


class View(Protocol):
    """What shows a run while it runs; the terminal view is one."""

    def sft(self, metrics: dict) -> None:
        """Show one supervised iteration."""

    def rl(self, metrics: dict) -> None:
        """Show one reinforcement-learning iteration."""

    def evaluation(self, metrics: dict) -> None:
        """Show one evaluation."""

    def note(self, text: str) -> None:
        """Say something."""

    def warn(self, text: str) -> None:
        """Say something alarming."""


@dataclass(frozen=True)
class Session:
    """One run on this rank."""

    settings: Settings
    ranks: Ranks
    task: Task
    tokenizer: Tokenizer
    log: RunLog
    view: View
    grader: Grader

    @property
    def mask_id(self) -> int:
        """Return the mask token's id."""
        assert self.settings.model.mask_token_id is not None
        return self.settings.model.mask_token_id

    @property
    def eos_id(self) -> int:
        """Return the end-of-text id."""
        assert self.settings.model.eos_token_id is not None
        return self.settings.model.eos_token_id


def encode_prompts(session: Session, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Return the ids of each prompt, int64."""
    device, encode = session.ranks.device, session.tokenizer.encode_prompt
    return [torch.tensor(encode(prompt), dtype=torch.int64, device=device) for prompt in prompts]


def sample_prompts(
    session: Session,
    network: Network,
    prompts: Sequence[Tensor],
    rollout_ids: Tensor,
    *,
    sampling: SamplingSettings,
    weights_version: int = 0,
    ended: Callable[[list[int], Tensor], None] | None = None,
) -> tuple[Trajectory, RolloutForward]:
    """Sample one completion per prompt, and return what counted the work beside them.

    Called by every rank of a replica with the same prompts.

    Args:
        ended: as `diffusion.sampler.sample` takes it; ranks may differ in it.
    """
    forward = make_forward(network, session.settings.rollout)
    context = SamplerContext(
        forward=forward,
        vocab=network.vocab,
        mask_id=session.mask_id,
        eos_id=session.eos_id,
        seed=session.settings.run.seed,
        token_budget=session.settings.train.token_budget,
        shift=session.settings.model.shift,
        most_rows=session.settings.rollout.rows,
    )
    trajectory = sample(
        prompts,
        rollout_ids,
        context=context,
        sampling=sampling,
        weights_version=weights_version,
        ended=ended,
    )
    return trajectory, forward


@dataclass(frozen=True)
class Answers:
    """Graded completions of all ranks, in the order of the problems; the same on every rank."""

    trajectory: Trajectory
    rewards: list[Reward]
    tokens: int  # that went through the network
    bubble: float  # share of the pipeline's stage-slots in which a stage had nothing to do
    seconds: dict[str, float]  # of this rank: see `answer`


def answer(
    session: Session,
    network: Network,
    problems: Sequence[Problem],
    rollout_ids: Tensor,
    *,
    sampling: SamplingSettings,
    weights_version: int = 0,
    split: Split = "train",
) -> Answers:
    """Complete and grade problems; called by every rank, data-parallel ranks share the work.

    Each completion is graded once, on the first rank of the replica that wrote it. A grader with
    workers begins with a completion as soon as it is written, while others still are.

    Args:
        split: train gives prompts and rewards of training, eval those of evaluation.

    Returns:
        In `seconds`: time/rollout of sampling; time/reward from there until all have graded;
        time/reward_hidden, in which workers graded while this rank sampled.
    """
    started, grader = time.perf_counter(), session.grader
    ranks, busy = network.ranks, grader.busy
    prompts = encode_prompts(session, task_prompts(session.task, problems, split=split))
    by_length = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    mine = by_length[ranks.data.rank :: ranks.data.size]
    handed_in: list[tuple[list[int], Future[list[Reward]]]] = []

    def hand_in(rows: list[int], tokens: Tensor) -> None:
        """Let the grader begin on completions [n, C] of this replica."""
        chosen = [problems[mine[row]] for row in rows]
        calls = to_grade(session, chosen, tokens, split=split)
        handed_in.append((rows, grader.start(calls)))

    is_beside = ranks.speaks_for_replica and grader.has_workers
    trajectory, forward = sample_prompts(
        session,
        network,
        [prompts[place] for place in mine],
        rollout_ids[mine],
        sampling=sampling,
        weights_version=weights_version,
        ended=hand_in if is_beside else None,
    )
    sampled = time.perf_counter()
    part = None
    if ranks.speaks_for_replica:
        if not is_beside:
            hand_in(list(range(len(mine))), trajectory.tokens)
        by_row = {row: r for rows, f in handed_in for row, r in zip(rows, f.result(), strict=True)}
        rewards = [by_row[row] for row in range(len(mine))]
        part = (mine, moved(trajectory, "cpu"), rewards, forward.tokens, forward.slots.bubble)
    waited = time.perf_counter() - sampled
    parts = _from_replicas(part)
    seconds = {"time/rollout": sampled - started, "time/reward": time.perf_counter() - sampled}
    if is_beside:
        seconds["time/reward_hidden"] = max(0.0, grader.busy - busy - waited)
    return _joined(parts, ranks.device, seconds)


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
