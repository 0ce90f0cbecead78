"""What generated tasks share: problems cut into disjoint splits."""

from collections.abc import Sequence
from typing import Literal

from agrpo_megatron.settings import TaskSettings
from agrpo_megatron.types import Problem

type Split = Literal["train", "eval"]


def split_problems(
    problems: Sequence[Problem], settings: TaskSettings, *, wider: str
) -> dict[Split, Sequence[Problem]]:
    """Cut problems with distinct keys into held-out ones and training ones.

    The held-out problems come first, so that they stay the same when more training problems are
    asked for. `wider` tells the user which options make more problems.

    Raises:
        ValueError: fewer problems than asked for.
    """
    held_out, train = settings.eval_problems, settings.train_problems
    if len(problems) < held_out + train:
        room = len(problems) - held_out
        fewer = f"use at most {room} training problems or " if room > 0 else ""
        raise ValueError(
            f"task.train_problems={train} and task.eval_problems={held_out} ask for "
            f"{held_out + train} different problems, but {settings.name} yields "
            f"{len(problems)} with these options; {fewer}{wider}"
        )
    return {"eval": problems[:held_out], "train": problems[held_out : held_out + train]}
