"""Completions of problems: sampled by all ranks, and graded."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.sampler import SamplerHooks, SamplingStopped
from agrpo_megatron.diffusion.sampler_state import SamplerState
from agrpo_megatron.megatron.forward import RolloutForward
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import gather_objects
from agrpo_megatron.resilience.stop import Stopped, Turns
from agrpo_megatron.rollout.experts import Recorder, make_recorder
from agrpo_megatron.rollout.sampling import sample_ids
from agrpo_megatron.rollout.session import Run, Safety, Session
from agrpo_megatron.tasks.base import Split, task_prompts
from agrpo_megatron.tasks.grading import Call
from agrpo_megatron.text.chat import shown_prompt
from agrpo_megatron.trajectories import join, moved, select
from agrpo_megatron.types import GradedRollouts, Problem, Prompt, Reward, Trajectory


@dataclass(frozen=True)
class Request:
    """R completions to sample and grade; the same on every rank."""

    problems: Sequence[Problem]  # one for each completion
    rollout_ids: Tensor  # [R]
    sampling: SamplingSettings
    split: Split = "train"  # prompts and rewards of training, or of evaluation
    weights_version: int = 0
    name: str = ""  # in the rollout cache; empty: no caching
    # Receives on each rank how many of its replica's rows took a denoising step.
    on_step: Callable[[int], None] | None = None


@dataclass(frozen=True)
class _Share:
    """A replica's part of a request: cached completions, and completions to sample."""

    cached: Trajectory | None
    places: list[int]  # in the request: of the cached completions, then of those to sample
    prompts: list[Tensor]  # of the completions to sample
    rollout_ids: Tensor  # likewise


def generate(session: Session, network: Network, request: Request) -> GradedRollouts:
    """Complete and grade problems; called by every rank, data-parallel ranks share the work.

    Cached completions are not sampled again. Each completion is graded once, on the first rank
    of its replica. A grader with workers starts on a completion as soon as it is complete, while
    other rows are still sampled.

    Returns:
        `seconds` holds timing/rollout (sampling), timing/reward (from there until all ranks have
        graded) and timing/reward_hidden (grading by workers while this rank sampled).

    Raises:
        Stopped: the ranks agreed to stop; finished completions are cached.
    """
    run, safety, grader = session.run, session.safety, session.run.grader
    is_training, ranks = request.split == "train", network.ranks
    started, busy = time.perf_counter(), grader.busy
    is_parallel = ranks.speaks_for_replica and grader.has_workers
    with safety.sections("rollout" if is_training else "evaluation"):
        share = _share(run, safety, network, request)
        grading = _Grading(run, [request.problems[place] for place in share.places], request.split)
        recorder = make_recorder(run.settings, ranks, share.rollout_ids) if is_training else None
        trajectory, forward = _sample_share(
            session, network, request, share, grading if is_parallel else None, recorder
        )
    sampled = time.perf_counter()
    with safety.sections("reward" if is_training else "evaluation"):
        part = None
        if ranks.speaks_for_replica:
            if not is_parallel:
                grading(range(len(share.places)), trajectory.tokens)
            rewards, on_cpu = grading.rewards(), moved(trajectory, "cpu")
            part = (share.places, on_cpu, rewards, forward.tokens, forward.slots.bubble)
        waited = time.perf_counter() - sampled
        parts = [part for part in gather_objects(part) if part is not None]
    seconds = {"timing/rollout": sampled - started, "timing/reward": time.perf_counter() - sampled}
    if is_parallel:
        seconds["timing/reward_hidden"] = max(0.0, grader.busy - busy - waited)
    experts = None if recorder is None else recorder.records
    return replace(_joined(parts, ranks.device, seconds), experts=experts)


def encode_prompts(run: Run, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Return the ids of each prompt, int64."""
    encoded, device = run.tokenizer.encode_prompts(prompts), run.ranks.device
    return [torch.tensor(ids, dtype=torch.int64, device=device) for ids in encoded]


def sample_prompts(
    run: Run,
    network: Network,
    prompts: Sequence[Tensor],
    rollout_ids: Tensor,
    *,
    sampling: SamplingSettings,
    hooks: SamplerHooks | None = None,
    recorder: Recorder | None = None,
) -> tuple[Trajectory, RolloutForward]:
    """Sample one completion per prompt with the tokenizer of a run; see `sample_ids`.

    Args:
        recorder: keeps the experts of the tokens; None: nothing does.
    """
    stop_ids, tools = sorted(run.tokenizer.stop_ids), {"hooks": hooks, "recorder": recorder}
    return sample_ids(
        run.settings, network, prompts, rollout_ids, sampling=sampling, stop_ids=stop_ids, **tools
    )


def _share(run: Run, safety: Safety, network: Network, request: Request) -> _Share:
    """Divide cached and missing completions among the replicas, long prompts first."""
    data, ids = network.ranks.data, request.rollout_ids
    prompts = encode_prompts(run, task_prompts(run.task, request.problems, split=request.split))
    cached = None
    if request.name:
        cached = safety.cache.find_completions(request.name, ids, sampling=request.sampling)
    known = set(cached.rollout_ids.tolist()) if cached is not None else set()
    numbers = list(enumerate(ids.tolist()))
    there = [place for place, number in numbers if number in known]
    missing = [place for place, number in numbers if number not in known]
    by_length = sorted(missing, key=lambda place: -len(prompts[place]))
    mine = by_length[data.rank :: data.size]
    if cached is not None:
        rows = torch.arange(len(there), device=ids.device)
        cached = select(cached, rows[data.rank :: data.size])
    return _Share(
        cached,
        there[data.rank :: data.size] + mine,
        [prompts[place] for place in mine],
        ids[torch.tensor(mine, dtype=torch.int64, device=ids.device)],
    )


def _sample_share(
    session: Session,
    network: Network,
    request: Request,
    share: _Share,
    grading: "_Grading | None",
    recorder: Recorder | None,
) -> tuple[Trajectory, RolloutForward]:
    """Return the share's trajectory, cached completions first; if one rank stops, all stop.

    Args:
        grading: receives each finished completion; None grades all at the end.
        recorder: keeps the experts of the tokens; None: nothing does.
    """
    run, safety = session.run, session.safety
    cached, count = share.cached, len(share.places) - len(share.prompts)
    if grading is not None and cached is not None and count:
        grading(range(count), cached.tokens)
    writer = safety.cache.writer(request.name, network.ranks) if request.name else None

    def on_complete(rows: list[int], part: Trajectory) -> None:
        if grading is not None:
            grading([count + row for row in rows], part.tokens)
        if writer is not None:
            writer.add(replace(part, weights_version=request.weights_version))

    def on_step(_: SamplerState, rows: list[int]) -> Sequence[int]:
        if request.on_step is not None:
            request.on_step(len(rows))
        return ()

    turns = Turns(safety.stop, network.ranks)
    is_asked = turns.is_asked if request.name else lambda: False
    hooks = SamplerHooks(on_complete, is_asked, on_step)
    sampled = None
    try:
        sampled = sample_prompts(
            run,
            network,
            share.prompts,
            share.rollout_ids,
            sampling=request.sampling,
            hooks=hooks,
            recorder=recorder,
        )
    except SamplingStopped:
        if writer is not None:
            writer.flush()
    turns.close()
    if request.name:
        _stop_together(safety, is_stopped=sampled is None)
    assert sampled is not None
    trajectory = replace(sampled[0], weights_version=request.weights_version)
    if cached is not None:
        trajectory = join([cached, trajectory])
    return trajectory, sampled[1]


def _stop_together(safety: Safety, *, is_stopped: bool) -> None:
    """Raise `Stopped` on every rank if sampling stopped on any rank."""
    reasons = gather_objects(safety.stop.reason or "" if is_stopped else None)
    given = [reason for reason in reasons if reason is not None]
    if given:
        raise Stopped(max(given))


class _Grading:
    """Passes a replica's completions to the grader, in parts."""

    def __init__(self, run: Run, problems: Sequence[Problem], split: Split):
        self._run, self._problems = run, problems
        self._split: Split = split
        self._parts: list[tuple[Sequence[int], Future[list[Reward]]]] = []

    def __call__(self, rows: Sequence[int], tokens: Tensor) -> None:
        """Start grading the completions [n, C] of some problems."""
        chosen = [self._problems[row] for row in rows]
        calls = grading_calls(self._run, chosen, tokens, split=self._split)
        self._parts.append((rows, self._run.grader.start(calls)))

    def rewards(self) -> list[Reward]:
        """Wait for the rewards of all problems, in their order."""
        graded = {
            row: reward
            for rows, future in self._parts
            for row, reward in zip(rows, future.result(), strict=True)
        }
        return [graded[row] for row in range(len(self._problems))]


def _joined(parts: list[tuple], device: torch.device, seconds: dict[str, float]) -> GradedRollouts:
    """Join the replicas' parts in the order of the request."""
    places, trajectories, rewards, tokens, bubbles = zip(*parts, strict=True)
    order = torch.tensor([place for part in places for place in part]).argsort()
    graded = [reward for part in rewards for reward in part]
    return GradedRollouts(
        moved(select(join(trajectories), order), device),
        [graded[i] for i in order.tolist()],
        sum(tokens),
        sum(bubbles) / len(bubbles),
        seconds,
    )


def grading_calls(
    run: Run, problems: Sequence[Problem], tokens: Tensor, *, split: Split
) -> list[Call]:
    """Return the grader's input: completions [n, C] as text; in evaluation also the raw text."""
    decode, decode_raw = run.tokenizer.decode, run.tokenizer.decode_raw
    return [
        Call(problem, decode(ids), decode_raw(ids) if split == "eval" else None)
        for problem, ids in zip(problems, tokens.tolist(), strict=True)
    ]


def sample_records(
    run: Run, problems: Sequence[Problem], rollouts: GradedRollouts, *, split: Split
) -> list[dict]:
    """Describe the first completions for samples.jsonl, `logging.samples` of them."""
    trajectory, chosen = rollouts.trajectory, problems[: run.settings.logging.samples]
    prompts = task_prompts(run.task, chosen, split=split)
    completions = trajectory.tokens[: len(chosen)].tolist()
    return [
        {
            "prompt": shown_prompt(prompt),
            "completion": run.tokenizer.decode(ids),
            "pieces": run.tokenizer.pieces(ids),
            "unmask_step": trajectory.unmask_step[row].tolist(),
            "num_steps": int(trajectory.num_steps[row]),
            "reward": rollouts.rewards[row].score,
            "correct": rollouts.rewards[row].correct,
            "solution": problems[row].solution,
        }
        for row, (prompt, ids) in enumerate(zip(prompts, completions, strict=True))
    ]
