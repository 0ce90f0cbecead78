"""A task of your own: one file, one class. Copy it, and change what a problem is and what is right.

    agrpo train examples/my_task.yaml                  two minutes on two CPU cores
    agrpo train FILE task.name=examples/my_task.py     in any settings file of yours

Here the model is given a number and must write its digits in ascending order: `50213=` `01235`.
"""

import random
from dataclasses import dataclass

from agrpo_megatron.config.schema import setting
from agrpo_megatron.tasks.base import Splits, Task, problem_count, split_problems
from agrpo_megatron.types import Problem, Reward


@dataclass(frozen=True)
class Options:
    """What a user may set, as task.options.digits; a wrong name or value is refused."""

    digits: int = setting(5, "digits of each number", low=2, high=9)


class SortDigits(Task):
    """Write the digits of a number in ascending order."""

    name = "sort_digits"
    options_type = Options
    options: Options

    # `reward` answers any text at once. Without this line it runs in worker processes, where a
    # reward that raises or hangs costs one completion its score, and not the run.
    is_bounded = True

    def load(self) -> Splits:
        """Make the problems: the same ones every time, none both trained on and held out."""
        count = problem_count(self.settings, "train") + problem_count(self.settings, "eval")
        numbers = range(10**self.options.digits)
        drawn = random.Random(self.settings.seed).sample(numbers, min(count, len(numbers)))
        problems = [self.make_problem(number) for number in drawn]
        return split_problems(problems, self.settings, fix="raise task.options.digits")

    def make_problem(self, number: int) -> Problem:
        """Return a problem: a unique key, what the other methods read, and a right answer.

        The answer is for supervised fine-tuning alone; leave it empty where you know none.
        """
        text = f"{number:0{self.options.digits}}"
        return Problem(key=text, fields={"number": text}, solution="".join(sorted(text)))

    def prompt(self, problem: Problem) -> str:
        """Return what the model reads; a `Chat` of messages for a model that knows chats."""
        return problem.fields["number"] + "="

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Grade an answer: 1 where it is right, up to 0.5 for its parts where it is not.

        `score` is what training maximises, `correct` what accuracy counts; `parts` are logged.
        """
        given, answer = problem.fields["number"], completion.strip()
        same_digits = sorted(answer) == sorted(given)
        pairs = list(zip(answer, answer[1:], strict=False))
        in_order = sum(a <= b for a, b in pairs) / len(pairs) if pairs else 0.0
        correct = same_digits and in_order == 1.0
        score = 1.0 if correct else 0.25 * same_digits + 0.25 * in_order
        return Reward(score, correct, {"same_digits": float(same_digits), "in_order": in_order})
