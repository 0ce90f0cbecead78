"""Dynamic sampling: the groups of one iteration; groups without variance are replaced."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched

import torch
from torch import Tensor

from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.rollout.data_order import pick_problems
from agrpo_megatron.rollout.generate import generate
from agrpo_megatron.rollout.metrics import (
    failure_warning,
    pass_at_group,
    reward_metrics,
    text_lengths,
)
from agrpo_megatron.rollout.replay import replayed_round
from agrpo_megatron.rollout.requests import Request
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.runs.stored_rollouts import round_name, sampling_number
from agrpo_megatron.scaling.flops import completion_flops
from agrpo_megatron.trajectories import join, select
from agrpo_megatron.types import GradedRollouts, Problem


@dataclass(frozen=True)
class Groups:
    """The groups of an iteration; rollouts of one problem are neighbours."""

    problems: list[Problem]  # of each rollout
    rollouts: GradedRollouts  # tokens and seconds count all sampled groups
    metrics: dict[str, float]  # over all sampled groups, so that accuracy has no bias
    counted: dict[str, int]  # completions and tokens of their texts, of all sampled groups
    tokens: int  # packed tokens that were processed


def sample_groups(session: Session, engine: Engine, iteration: int) -> Groups:
    """Return `prompts_per_iteration` groups, the same on every rank; called by every rank.

    A group of equal rewards has no advantage. Each of up to `resample_rounds` further rounds
    samples one new problem for each such group; groups with variance replace them, in order.
    Groups without variance after the last round stay, so that shapes are constant.
    """
    algorithm = session.run.settings.algorithm
    count, size = algorithm.prompts_per_iteration, algorithm.group_size
    problems: list[Problem] = []  # of all rounds, like the rollouts
    rollouts: list[GradedRollouts] = []
    slots, missing = list(range(count)), list(range(count))  # a slot holds a group's number
    for number in range(1 + algorithm.resample_rounds):
        if not missing:
            break
        first = len(problems) // size
        chosen, found = _sample_round(session, engine, (iteration, number), groups=len(missing))
        problems += chosen
        rollouts.append(found)
        scores = batched((reward.score for reward in found.rewards), size)
        useful = [group for group, own in enumerate(scores, start=first) if len(set(own)) > 1]
        if number == 0:
            missing = [slot for slot in missing if slot not in useful]
            continue
        for slot, group in zip(missing, useful, strict=False):
            slots[slot] = group
        missing = missing[len(useful) :]
    return groups_of(session, iteration, problems, rollouts, slots)


def groups_of(
    session: Session,
    iteration: int,
    problems: list[Problem],
    rollouts: list[GradedRollouts],
    slots: Sequence[int],
) -> Groups:
    """Return the groups of an iteration with their metrics.

    Args:
        problems: of the completions of all rounds.
        rollouts: of each round.
        slots: the numbers of the groups that are kept.
    """
    algorithm = session.run.settings.algorithm
    count, size = algorithm.prompts_per_iteration, algorithm.group_size
    rewards = [reward for found in rollouts for reward in found.rewards]
    metrics = reward_metrics(rewards, problems)
    metrics["pass_at_group"] = pass_at_group(rewards, size)
    if algorithm.resample_rounds:
        metrics["rollout/rounds"] = len(rollouts) - 1
        metrics["rollout/resampled_groups"] = len(problems) // size - count
    rows = [group * size + place for group in slots for place in range(size)]
    kept = _chosen(rollouts, rows)
    metrics["flops"] = 0
    if session.run.replay is not None:
        metrics["rollout/replayed"] = len(rewards)
    else:
        counts = [completion_flops(f.trajectory, session.run.settings) for f in rollouts]
        metrics["flops"] = sum(map(sum, counts))
        unmasked = sum(int(f.trajectory.is_sampled.sum()) for f in rollouts)
        if spent := kept.seconds.get("timing/rollout"):  # all may be an earlier attempt's
            metrics["perf/unmasked_per_second"] = unmasked / spent
    warning = failure_warning(rewards, session.run.settings.task.grader.failed_score)
    if warning is not None:
        session.output.view.warn(f"iteration {iteration + 1}: {warning}")
    stops = session.run.tokenizer.stop_ids
    texts = (text_lengths(found.trajectory.tokens, stops) for found in rollouts)
    counted = {
        "totals/completions": len(rewards),
        "totals/tokens": sum(int(own.sum()) for own in texts),
    }
    return Groups([problems[row] for row in rows], kept, metrics, counted, kept.tokens)


def _sample_round(
    session: Session, engine: Engine, when: tuple[int, int], *, groups: int
) -> tuple[list[Problem], GradedRollouts]:
    """Sample some groups in a round of an iteration, or read them from disk.

    A replayed round has the problems and the rewards of the run that sampled it, so the further
    rounds of the iteration are that run's as well.
    """
    run, cache = session.run, session.safety.cache
    settings = run.settings
    number, chosen, ids = picked_round(session, engine, when, groups=groups)
    if run.replay is not None:
        with session.safety.sections("rollout"):
            return chosen, replayed_round(run.replay, number, ids, run.ranks, settings)
    rollouts = cache.find(number, ids, sampling=settings.sampling)
    if rollouts is None:
        name = round_name(number)
        request = Request(chosen, ids, settings.sampling, weights_version=when[0], name=name)
        with engine.sampling() as network:
            rollouts = generate(session, network, request)
        cache.keep(number, rollouts)
    return chosen, rollouts


def picked_round(
    session: Session, engine: Engine, when: tuple[int, int], *, groups: int
) -> tuple[int, list[Problem], Tensor]:
    """Return a round's number through the run, and the problem and the id of each completion."""
    run, algorithm = session.run, session.run.settings.algorithm
    number, size = sampling_number(*when, algorithm), algorithm.group_size
    first = number * algorithm.prompts_per_iteration
    places = range(first, first + groups)
    picked = pick_problems(run.task.shares, places, seed=run.settings.run.seed)
    problems = run.task.problems("train")
    chosen = [problems[place] for place in picked for _ in range(size)]
    return number, chosen, torch.arange(len(chosen), device=engine.ranks.device) + first * size


def _chosen(rounds: list[GradedRollouts], rows: list[int]) -> GradedRollouts:
    """Return some of the rollouts of several rounds, in the order of `rows`."""
    if len(rounds) == 1:
        return rounds[0]
    rewards = [reward for found in rounds for reward in found.rewards]
    trajectories = [found.trajectory for found in rounds]
    order = torch.tensor(rows, device=trajectories[0].tokens.device)
    names = sorted({name for found in rounds for name in found.seconds})
    records = [found.experts for found in rounds if found.experts is not None]
    return GradedRollouts(
        select(join(trajectories), order),
        [rewards[row] for row in rows],
        sum(found.tokens for found in rounds),
        sum(found.bubble for found in rounds) / len(rounds),
        {name: sum(found.seconds.get(name, 0.0) for found in rounds) for name in names},
        {number: record for part in records for number, record in part.items()},
        sum(found.passes for found in rounds),
    )
