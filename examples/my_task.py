"""A custom task: one file, one class. Copy it, and change the problems and the reward.

    agrpo train examples/my_task.yaml                  two minutes on two CPU cores
    agrpo train FILE task.name=examples/my_task.py     with your settings file

The model reads a number and must write its digits in ascending order: `50213=` `01235`.
"""

import random
from dataclasses import dataclass

from agrpo_megatron.config.schema import setting
from agrpo_megatron.tasks.base import Splits, Task, problem_count, split_problems
from agrpo_megatron.types import Problem, Reward


@dataclass(frozen=True)
class Options:
    """Settings such as task.options.digits; a wrong name or value is refused."""

    digits: int = setting(5, "digits of each number", low=2, high=9)


class SortDigits(Task):
    """Write the digits of a number in ascending order."""

    name = "sort_digits"
    options_type = Options
    options: Options

    # `reward` grades any text at once. Without this line it runs in worker processes: a reward
    # that raises or hangs then affects the score of one completion, and not the run.
    is_bounded = True

    def load(self) -> Splits:
        """Return `{"train": [...], "eval": [...]}`: always the same problems, no key in both."""
        count = problem_count(self.settings, "train") + problem_count(self.settings, "eval")
        numbers = range(10**self.options.digits)
        drawn = random.Random(self.settings.seed).sample(numbers, min(count, len(numbers)))
        problems = [self.make_problem(number) for number in drawn]
        return split_problems(problems, self.settings, fix="raise task.options.digits")

    def make_problem(self, number: int) -> Problem:
        """Return a problem: a unique key, fields for the other methods, and a right answer.

        Only supervised fine-tuning uses the answer; leave it empty if it is unknown.
        """
        text = f"{number:0{self.options.digits}}"
        return Problem(key=text, fields={"number": text}, solution="".join(sorted(text)))

    def prompt(self, problem: Problem) -> str:
        """Return the prompt: text, or a `Chat` of messages for a chat model."""
        return problem.fields["number"] + "="

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Grade an answer: 1 if it is right, else up to 0.5 for its parts.

        Training maximises `score`, accuracy counts `correct`; `parts` are logged.
        """
        given, answer = problem.fields["number"], completion.strip()
        same_digits = sorted(answer) == sorted(given)
        pairs = list(zip(answer, answer[1:], strict=False))
        in_order = sum(a <= b for a, b in pairs) / len(pairs) if pairs else 0.0
        correct = same_digits and in_order == 1.0
        score = 1.0 if correct else 0.25 * same_digits + 0.25 * in_order
        return Reward(score, correct, {"same_digits": float(same_digits), "in_order": in_order})
