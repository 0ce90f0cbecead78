"""Rewards that fail from the start end a run, before it spends time on them."""

from collections.abc import Sequence

from agrpo_megatron.megatron.parallel import gather_objects, on_main
from agrpo_megatron.rollout.session import Run
from agrpo_megatron.tasks.base import Split
from agrpo_megatron.tasks.grading import (
    failing,
    failing_error,
    grade_solutions,
    wrong_solutions,
)
from agrpo_megatron.types import Problem, Reward


def check_solutions(run: Run, splits: Sequence[Split]) -> list[str]:
    """Grade known solutions on the main rank; return notes, on every rank. Called by every rank.

    Raises:
        ValueError: a reward service does not answer, or most of these rewards fail; on every rank.
    """
    return on_main(run.ranks, lambda: _solution_notes(run, splits))


def _solution_notes(run: Run, splits: Sequence[Split]) -> list[str]:
    if run.task.services is not None:
        run.task.services.check()
    graded = {split: grade_solutions(run.task, run.grader, split) for split in splits}
    both = [pair for pairs in graded.values() for pair in pairs]
    found = failing(
        [p for p, _ in both], [r for _, r in both], run.settings.task.grader.most_failed
    )
    if found:
        raise failing_error(found, [run.grader.first_failure], when="of known solutions")
    return [n for split in splits for n in wrong_solutions(run.task, graded[split], split)]


def refuse_failing(
    run: Run, problems: Sequence[Problem], rewards: Sequence[Reward], *, when: str
) -> None:
    """Refuse rewards of which more than `task.grader.most_failed` failed; called by every rank.

    Args:
        rewards: the same on every rank.
        when: for the error, as `of the first evaluation`.

    Raises:
        ValueError: they are refused; the note of the error is the first traceback of all ranks.
    """
    found = failing(problems, rewards, run.settings.task.grader.most_failed)
    if found:
        raise failing_error(found, gather_objects(run.grader.first_failure), when=when)
