"""Base classes of the four public benchmarks: protocols, data files, generated problems."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy

from agrpo_megatron.config.schema import setting
from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import benchmarks
from agrpo_megatron.tasks.base import Split, Splits, problem_count, split_problems
from agrpo_megatron.tasks.data import Row
from agrpo_megatron.tasks.own.files import FileTask
from agrpo_megatron.tasks.rewards import equivalence
from agrpo_megatron.types import Problem, Prompt, Reward


@dataclass(frozen=True)
class PublicOptions:
    """Options of every public benchmark."""

    protocol: str = setting(
        "agrpo", "messages, rewards and parsers, as published", choices=benchmarks.PROTOCOLS
    )
    train: str | None = setting(
        None,
        "training problems: a file, NAME[:CONFIG][@SPLIT] on Hugging Face, or none, for evaluation "
        "only; null: the protocol's, or generated ones",
    )
    eval: str | None = setting(None, "held-out problems, in the same form")
    eval_rows: str = setting(
        "all",
        "rows of `eval`; d1: the 256 rows of d1 for Countdown and Sudoku",
        choices=("all", "d1"),
    )


class PublicTask(FileTask):
    """A benchmark as AGRPO and d1 run it, with problems from files or datasets."""

    options: PublicOptions
    datasets: ClassVar[dict[Split, dict[str, str]]] = {}  # by split and protocol
    generation_fix: ClassVar[str] = ""  # the options that generate more problems

    def __init__(self, settings: TaskSettings, options: Any):
        super().__init__(settings, options)
        self.is_bounded |= options.protocol == "d1"  # only strings and small numbers

    def prepare(self) -> None:
        """Import math-verify if the protocol uses it."""
        if self.options.protocol == "agrpo" and self.name != "sudoku":
            equivalence.load_comparison()

    def make_problem(self, row: dict[str, Any]) -> Problem:
        """Read one row of a data set."""
        fields = benchmarks.READERS[self.name](row)
        return Problem(benchmarks.problem_key(self.name, fields), fields, self.solution(fields))

    def solution(self, fields: dict[str, Any]) -> str:
        """Return a right completion; empty if unknown."""
        answer = fields.get("answer", fields.get("solution"))
        if answer is None:
            return ""
        return benchmarks.solution_text(self.name, self.options.protocol, fields, answer)

    def prompt(self, problem: Problem) -> Prompt:
        """Return the protocol's training prompt."""
        return benchmarks.build_prompt(self.name, self.options.protocol, "train", problem.fields)

    def eval_prompt(self, problem: Problem) -> Prompt:
        """Return the protocol's evaluation prompt, prefill included."""
        return benchmarks.build_prompt(self.name, self.options.protocol, "eval", problem.fields)

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Return the sum of the protocol's reward functions, which are its parts."""
        return benchmarks.grade(self.name, self.options.protocol, problem.fields, completion)

    def verdict(self, problem: Problem, completion: str, raw: str) -> Reward:
        """Return the verdict of the protocol's evaluation on `raw`, special tokens included."""
        return benchmarks.verdict(self.name, self.options.protocol, problem.fields, raw)

    def source(self, split: Split) -> str | None:
        """Return the file or dataset of a split; None if its problems are generated."""
        chosen = self.options.train if split == "train" else self.options.eval
        return chosen or self.datasets.get(split, {}).get(self.options.protocol)

    def pick(self, split: Split, rows: list[tuple[int, Row]]) -> list[tuple[int, Row]]:
        """Return the rows of a source that the options choose."""
        return _d1_rows(rows) if split == "eval" and self.options.eval_rows == "d1" else rows


class GeneratedTask(PublicTask):
    """A benchmark with generated problems, and with a plain protocol besides the published ones.

    Plain prompts are short and plain rewards at most 1, for models with a small vocabulary.
    """

    is_bounded = True

    def make(self, rng: random.Random, count: int) -> list[Problem]:
        """Make up to `count` different problems in random order, with plain-text solutions."""
        raise NotImplementedError

    def plain_prompt(self, problem: Problem) -> str:
        """Return the prompt of the plain protocol."""
        raise NotImplementedError

    def plain_reward(self, problem: Problem, completion: str) -> Reward:
        """Return the reward of the plain protocol."""
        raise NotImplementedError

    def fill(self, train: list[Problem] | None, held_out: list[Problem] | None) -> Splits:
        """Generate the splits without a file; no generated problem repeats one of a file."""
        if train is None and held_out is None:
            count = problem_count(self.settings, "eval") + problem_count(self.settings, "train")
            return split_problems(self._generate(count), self.settings, fix=self.generation_fix)
        if held_out is None:
            held_out = self._generate_without_leaks("eval", train or [])
        if train is None:
            train = self._generate_without_leaks("train", held_out)
        return {"train": train, "eval": held_out}

    def prompt(self, problem: Problem) -> Prompt:
        """Return the protocol's training prompt."""
        return self.plain_prompt(problem) if self.is_plain else super().prompt(problem)

    def eval_prompt(self, problem: Problem) -> Prompt:
        """Return the protocol's evaluation prompt."""
        return self.plain_prompt(problem) if self.is_plain else super().eval_prompt(problem)

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Return the protocol's training reward."""
        if self.is_plain:
            return self.plain_reward(problem, completion)
        return super().reward(problem, completion)

    def verdict(self, problem: Problem, completion: str, raw: str) -> Reward:
        """Return the protocol's verdict."""
        if self.is_plain:
            return self.plain_reward(problem, completion)
        return super().verdict(problem, completion, raw)

    @property
    def is_plain(self) -> bool:
        """Whether the protocol is the plain one."""
        return self.options.protocol == "plain"

    def _generate(self, count: int) -> list[Problem]:
        made = self.make(random.Random(f"{self.name} {self.settings.seed}"), count)
        write = functools.partial(benchmarks.solution_text, self.name, self.options.protocol)
        return [replace(p, solution=write(p.fields, p.solution)) for p in made]

    def _generate_without_leaks(self, split: Split, others: Sequence[Problem]) -> list[Problem]:
        """Generate a split that shares no leak key with the other split's file."""
        count = problem_count(self.settings, split)
        taken = {self.leak_key(problem, self) for problem in others}
        made = [p for p in self._generate(2 * count) if self.leak_key(p, self) not in taken]
        if len(made) < count:
            raise ValueError(
                f"task.{split}_problems={count}: with these options {self.name} makes {len(made)} "
                f"problems that the other split does not have; use at most {len(made)}, or "
                f"{self.generation_fix}"
            )
        return made[:count]


def _d1_rows[T](rows: Sequence[T], count: int = 256) -> list[T]:
    """Draw the evaluation rows of d1 for Countdown and Sudoku, in its order."""
    drawn = numpy.random.RandomState(42).choice(len(rows), min(count, len(rows)), replace=False)
    return [rows[place] for place in drawn]
