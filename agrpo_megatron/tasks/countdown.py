"""Countdown: write an expression that uses each given number once and equals the target."""

import random
from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.schema import setting
from agrpo_megatron.tasks.base import Split, Task
from agrpo_megatron.tasks.benchmarks import PROTOCOLS, solution_text
from agrpo_megatron.tasks.countdown_problems import SIGNS, Rules, make_problems, make_series, solve
from agrpo_megatron.tasks.public import GeneratedTask, PublicOptions, PublicTask
from agrpo_megatron.tasks.rewards.arithmetic import evaluate_whole
from agrpo_megatron.tasks.rewards.extract import last_tagged
from agrpo_megatron.types import Problem, Prompt, Reward

MAX_EXPRESSION = 200  # characters; longer text is wrong, and is not parsed


@dataclass(frozen=True)
class CountdownOptions(PublicOptions):
    """Options of the Countdown task."""

    protocol: str = setting(
        "plain", "short prompts for small models, or as published", choices=("plain", *PROTOCOLS)
    )
    numbers: int = setting(3, "given numbers", low=2, high=6)
    low: int = setting(1, "smallest given number", low=1, high=999)
    high: int = setting(9, "largest given number", low=1, high=999)
    operators: str = setting("+-*", "allowed operators, out of + - * /; division must be exact")
    parentheses: bool = setting(False, "allow parentheses, and give problems that need them")
    partial_credit: float = setting(
        0.0, "plain: score of an expression over the given numbers with the wrong value", low=0
    )
    problems: int = setting(
        1, "generated problems in one prompt, plain; the score is their mean", low=1, high=99
    )

    def __post_init__(self) -> None:
        if self.high < self.low:
            raise ValueError(
                f"task.options.high={self.high} is below task.options.low={self.low}; "
                f"use at least {self.low}"
            )
        known = set(self.operators) <= set(SIGNS)
        if not known or not self.operators or len(set(self.operators)) < len(self.operators):
            raise ValueError(
                f"task.options.operators={self.operators} must name some of + - * /, each once; "
                'use for example "+-*"'
            )
        if self.partial_credit >= 1:
            raise ValueError(
                f"task.options.partial_credit={self.partial_credit} must be below the 1 of a "
                "right answer; use for example 0.1"
            )
        is_made = self.protocol == "plain" and self.train is None and self.eval is None
        if self.problems > 1 and not is_made:
            raise ValueError(
                f"task.options.problems={self.problems} needs generated problems and short "
                "prompts; use task.options.problems=1, or protocol=plain without files"
            )


class Countdown(GeneratedTask):
    """Reach a target with a few numbers, written as one expression.

    `plain` has short prompts for small models; its arithmetic is exact: every division must be
    exact at every step.
    """

    name = "countdown"
    options_type = CountdownOptions
    options: CountdownOptions
    generation_fix = "raise task.options.high"
    selection_fix = "set task.options.numbers to how many numbers they have"

    def make(self, rng: random.Random, count: int) -> list[Problem]:
        """Make up to `count` different problems, with an expression as solution."""
        options = self.options
        rules = Rules(
            options.numbers, options.low, options.high, options.operators, options.parentheses
        )
        if options.problems > 1:
            return make_series(rng, count, rules=rules, length=options.problems)
        return make_problems(rng, count, rules=rules)

    def select(self, split: Split, problems: list[Problem]) -> list[Problem]:
        """Return the problems with `numbers` numbers; the published data mixes counts."""
        return [p for p in problems if len(p.fields["numbers"]) == self.options.numbers]

    def known_solution(self, problem: Problem, split: Split) -> str:
        """Return a solution; for a problem of a file it is searched if it has 3 numbers."""
        text, options = problem.solution, self.options
        if not text and len(numbers := problem.fields["numbers"]) == 3:
            plain = Rules(3, operators=options.operators, parentheses=options.parentheses)
            rules = plain if self.is_plain else Rules(3)
            found = solve(numbers, problem.fields["target"], rules=rules) or "no solution"
            text = solution_text(self.name, options.protocol, problem.fields, found)
        reads_box = split == "eval" and options.protocol == "d1"
        return f"\\boxed{{{last_tagged(text)}}}" if reads_box and text else text

    def leak_key(self, problem: Problem, other: Task) -> str:
        """Return the numbers; between generated splits also the target."""
        assert isinstance(other, PublicTask)
        is_generated = self.source("train") is None and other.source("eval") is None
        return problem.key if is_generated else problem.key.partition(" = ")[0]

    def plain_prompt(self, problem: Problem) -> Prompt:
        """Return the numbers and the target, such as `3 5 7 = 22:`.

        Several problems are `7 5=12,2 9=07:`. Every number has the same width, as small models find
        a problem by its place.
        """
        if (series := problem.fields.get("series")) is None:
            numbers = " ".join(map(str, problem.fields["numbers"]))
            return f"{numbers} = {problem.fields['target']}:"
        options = self.options
        largest = options.high**options.numbers if "*" in options.operators else 0
        digits, width = (
            len(str(options.high)),
            len(str(max(largest, options.high * options.numbers))),
        )
        texts = (
            " ".join(f"{number:0{digits}}" for number in one["numbers"])
            + f"={one['target']:0{width}}"
            for one in series
        )
        return ",".join(texts) + ":"

    def plain_reward(self, problem: Problem, completion: str) -> Reward:
        """Grade an expression, or one for each problem, with spaces between.

        The part `numbers` is 1 if an expression uses exactly the given numbers. Score and parts of
        several problems are means; all must be right.
        """
        if (series := problem.fields.get("series")) is None:
            return self._grade(problem.fields, completion.strip())
        texts = completion.split()
        graded = [self._grade(one, text) for one, text in zip(series, texts, strict=False)]
        return Reward(
            sum(reward.score for reward in graded) / len(series),
            len(texts) == len(series) and all(reward.correct for reward in graded),
            {
                part: sum(reward.parts[part] for reward in graded) / len(series)
                for part in ("numbers", "value")
            },
        )

    def _grade(self, fields: dict[str, Any], text: str) -> Reward:
        options = self.options
        legal = "0123456789" + options.operators + ("()" if options.parentheses else "")
        value = None
        if len(text) <= MAX_EXPRESSION and set(text) <= set(legal):
            value = evaluate_whole(text, fields["numbers"])
        if value is None:
            return Reward(0.0, False, {"numbers": 0.0, "value": 0.0})
        correct = value == fields["target"]
        score = 1.0 if correct else options.partial_credit
        return Reward(score, correct, {"numbers": 1.0, "value": float(correct)})
