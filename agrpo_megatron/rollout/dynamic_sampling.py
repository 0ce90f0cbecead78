"""The groups of one iteration: sampled, graded, and replaced where they have nothing to teach."""

from dataclasses import dataclass

import torch

from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.rollout.cache import round_name, sampling_number
from agrpo_megatron.rollout.data_order import pick_problems
from agrpo_megatron.rollout.generate import answer
from agrpo_megatron.rollout.metrics import failure_warning, reward_metrics
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.trajectories import join
from agrpo_megatron.types import Answers, Problem, Reward


@dataclass(frozen=True)
class Groups:
    """What an iteration trains on; rollouts of one problem are neighbours."""

    problems: list[Problem]  # of each rollout
    answers: Answers  # to them; tokens and seconds are of all that was sampled
    metrics: dict[str, float]  # of all that was sampled, so that accuracy has no bias


def sample_groups(session: Session, engine: Engine, iteration: int) -> Groups:
    """Return `prompts_per_iteration` groups, the same on every rank; called by every rank.

    A group of equal rewards has no advantage. In each of up to `resample_rounds` rounds, as many
    further problems are sampled as there are such groups, and those that differ take their
    places, in order. What is left after the last round stays, so shapes are always the same.
    """
    algorithm = session.settings.algorithm
    count, group, rounds = (
        algorithm.prompts_per_iteration,
        algorithm.group_size,
        algorithm.resample_rounds,
    )
    problems: list[Problem] = []  # of all that was sampled, as are the answers
    answers: list[Answers] = []
    slots, missing = list(range(count)), list(range(count))  # a slot holds a group's number
    for number in range(1 + rounds):
        if not missing:
            break
        first, wanted = len(problems) // group, len(missing)
        chosen, found = _sample(session, engine, (iteration, number), groups=wanted)
        problems += chosen
        answers.append(found)
        useful = [first + place for place in range(wanted) if _differs(found.rewards, place, group)]
        if number == 0:
            missing = [slot for slot in missing if slot not in useful]
            continue
        for slot, chosen_group in zip(missing, useful, strict=False):
            slots[slot] = chosen_group
        missing = missing[len(useful) :]
    rewards = [reward for found in answers for reward in found.rewards]
    metrics = reward_metrics(rewards, problems)
    if rounds:
        metrics["rollout/rounds"] = len(answers) - 1
        metrics["rollout/resampled_groups"] = len(problems) // group - count
    warning = failure_warning(rewards, session.settings.task.grader.failed_score)
    if warning is not None:
        session.view.warn(f"iteration {iteration + 1}: {warning}")
    rows = [slot * group + place for slot in slots for place in range(group)]
    return Groups([problems[row] for row in rows], _chosen(answers, rows), metrics)


def _sample(
    session: Session, engine: Engine, when: tuple[int, int], *, groups: int
) -> tuple[list[Problem], Answers]:
    """Sample some groups in an iteration's round; what the bank has is not sampled again."""
    settings, algorithm, device = session.settings, session.settings.algorithm, engine.ranks.device
    iteration, size = when[0], algorithm.group_size
    number = sampling_number(*when, algorithm)
    first = number * algorithm.prompts_per_iteration
    problems = session.task.problems("train")
    places = range(first, first + groups)
    picked = pick_problems(session.task.shares, places, seed=settings.run.seed)
    chosen = [problems[place] for place in picked for _ in range(size)]
    ids = torch.arange(len(chosen), device=device) + first * size
    bank = session.bank
    answers = bank.find(number, ids, sampling=settings.sampling) if bank is not None else None
    if answers is None:
        answers = answer(
            session,
            engine.rollout_network(),
            chosen,
            ids,
            sampling=settings.sampling,
            weights_version=iteration,
            kept=round_name(number),
        )
        if bank is not None:
            bank.keep(number, answers)
    return chosen, answers


def _differs(rewards: list[Reward], place: int, group: int) -> bool:
    """Say whether a group's rewards are not all the same."""
    return len({reward.score for reward in rewards[place * group : (place + 1) * group]}) > 1


def _chosen(answers: list[Answers], rows: list[int]) -> Answers:
    """Return some of the answers of several rounds, in the order of `rows`."""
    if len(answers) == 1:
        return answers[0]
    rewards = [reward for found in answers for reward in found.rewards]
    trajectories = [found.trajectory for found in answers]
    order = torch.tensor(rows, device=trajectories[0].tokens.device)
    names = sorted({name for found in answers for name in found.seconds})
    return Answers(
        join(trajectories, order),
        [rewards[row] for row in rows],
        sum(found.tokens for found in answers),
        sum(found.bubble for found in answers) / len(answers),
        {name: sum(found.seconds.get(name, 0.0) for found in answers) for name in names},
    )
