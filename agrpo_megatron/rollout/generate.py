"""Completions of problems: sampled by all ranks, and graded."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.sampler import SamplerHooks, SamplingStopped
from agrpo_megatron.diffusion.sampler_state import SamplerState
from agrpo_megatron.megatron.forward import RolloutForward
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import Ranks, gather_objects
from agrpo_megatron.resilience.stop import Stopped, Turns
from agrpo_megatron.rollout.experts import Recorder, make_recorder
from agrpo_megatron.rollout.requests import Request, Share, share_of
from agrpo_megatron.rollout.sampling import sample_ids
from agrpo_megatron.rollout.session import Run, Safety, Session
from agrpo_megatron.scaling.flops import completion_flops
from agrpo_megatron.tasks.base import Split
from agrpo_megatron.tasks.grading import Call
from agrpo_megatron.trajectories import join, moved, select
from agrpo_megatron.types import GradedRollouts, Problem, Reward, Trajectory


@dataclass(frozen=True)
class Sampled:
    """The completions of a replica; rewards may be outstanding."""

    ranks: Ranks  # the layout of the rollout
    places: list[int]  # of the completions, in the request
    trajectory: Trajectory
    grading: "_Grading"
    is_parallel: bool  # whether workers or services have begun to grade
    section: str  # in which the rewards are awaited
    work: tuple[int, float, int]  # tokens, bubble and passes of `GradedRollouts`
    experts: dict[int, Any] | None  # see `GradedRollouts`
    seconds: float  # of the sampling


def generate(session: Session, network: Network, request: Request) -> GradedRollouts:
    """Complete and grade problems; called by every rank, data-parallel ranks share the work.

    Raises:
        Stopped: as `sample_request`.
    """
    return grade(session, sample_request(session, network, request))


def sample_request(session: Session, network: Network, request: Request) -> Sampled:
    """Complete problems; called by every rank, data-parallel ranks share the work.

    Cached completions are not sampled again. Each completion is graded once, on the first rank
    of its replica. A grader with workers starts on a completion as soon as it is complete, while
    other rows are still sampled.

    Raises:
        Stopped: the ranks agreed to stop; finished completions are cached.
    """
    run, safety = session.run, session.safety
    is_training, ranks = request.split == "train", network.ranks
    started, is_parallel = time.perf_counter(), ranks.speaks_for_replica and run.grader.has_workers
    with safety.sections("rollout" if is_training else "evaluation"):
        share = share_of(run, safety, network, request)
        grading = _Grading(run, [request.problems[place] for place in share.places], request.split)
        recorder = make_recorder(run.settings, ranks, share.rollout_ids) if is_training else None
        trajectory, forward = _sample_share(
            session, network, request, share, grading if is_parallel else None, recorder
        )
    return Sampled(
        ranks=ranks,
        places=share.places,
        trajectory=trajectory,
        grading=grading,
        is_parallel=is_parallel,
        section="reward" if is_training else "evaluation",
        work=(forward.tokens, forward.slots.bubble, forward.passes),
        experts=None if recorder is None else recorder.records,
        seconds=time.perf_counter() - started,
    )


def grade(session: Session, sampled: Sampled) -> GradedRollouts:
    """Wait for the rewards of completions, and share both; called by every rank.

    Returns:
        `seconds` holds timing/rollout (sampling), timing/reward (from this call until all ranks
        have graded) and timing/reward_hidden (grading by workers before this call).
    """
    grader, ranks, started = session.run.grader, sampled.ranks, time.perf_counter()
    with session.safety.sections(sampled.section):
        part = None
        if ranks.speaks_for_replica:
            if not sampled.is_parallel:
                sampled.grading(range(len(sampled.places)), sampled.trajectory.tokens)
            rewards, on_cpu = sampled.grading.rewards(), moved(sampled.trajectory, "cpu")
            part = (sampled.places, on_cpu, rewards, *sampled.work)
        waited = time.perf_counter() - started
        parts = [part for part in gather_objects(part) if part is not None]
    seconds = {"timing/rollout": sampled.seconds, "timing/reward": time.perf_counter() - started}
    if sampled.is_parallel:
        busy = grader.busy.pop(sampled.grading, 0.0)
        seconds["timing/reward_hidden"] = max(0.0, busy - waited)
    return replace(_joined(parts, ranks.device, seconds), experts=sampled.experts)


def spent_on(session: Session, sampled: Sampled) -> tuple[int, int, float]:
    """Return the FLOPs and packed tokens of all replicas, and seconds on this rank; every rank."""
    part = None
    if sampled.ranks.speaks_for_replica:
        counted = replace(sampled.trajectory, support_ids=None, edit_support_ids=None)
        part = sampled.places, moved(counted, "cpu"), sampled.work[0]
    with session.safety.sections(sampled.section):
        parts = [part for part in gather_objects(part) if part is not None]
    places, trajectories, tokens = zip(*parts, strict=True)
    order = torch.tensor([place for part in places for place in part]).argsort()
    whole = select(join(trajectories), order)  # completions of a prompt share its work
    return sum(completion_flops(whole, session.run.settings)), sum(tokens), sampled.seconds


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


def _sample_share(
    session: Session,
    network: Network,
    request: Request,
    share: Share,
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
    with suppress(SamplingStopped):
        sampled = sample_prompts(
            run,
            network,
            share.prompts,
            share.rollout_ids,
            sampling=request.sampling,
            hooks=hooks,
            recorder=recorder,
        )
    if writer is not None and (sampled is None or request.is_ahead):
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
        self._parts.append((rows, self._run.grader.start(calls, owner=self)))

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
    places, trajectories, rewards, tokens, bubbles, passes = zip(*parts, strict=True)
    order = torch.tensor([place for part in places for place in part]).argsort()
    graded = [reward for part in rewards for reward in part]
    return GradedRollouts(
        moved(select(join(trajectories), order), device),
        [graded[i] for i in order.tolist()],
        sum(tokens),
        sum(bubbles) / len(bubbles),
        seconds,
        passes=sum(passes),
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
