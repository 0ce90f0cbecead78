"""GSM8K and MATH: problems from files or Hugging Face, answers compared by value."""

from dataclasses import dataclass, replace
from typing import Any

from agrpo_megatron.config.schema import setting
from agrpo_megatron.tasks import benchmarks
from agrpo_megatron.tasks.base import Split
from agrpo_megatron.tasks.data import answer_column, optional_column
from agrpo_megatron.tasks.public import PublicOptions, PublicTask
from agrpo_megatron.tasks.rewards.extract import boxed
from agrpo_megatron.types import Problem


class Gsm8k(PublicTask):
    """Grade-school word problems with a number as answer."""

    name = "gsm8k"
    options_type = PublicOptions
    datasets = {
        "train": dict.fromkeys(benchmarks.PROTOCOLS, "openai/gsm8k:main"),
        "eval": {"agrpo": "madrylab/gsm8k-platinum:main", "d1": "openai/gsm8k:main"},
    }


@dataclass(frozen=True)
class MathOptions(PublicOptions):
    """Options of MATH."""

    levels: list[int] | None = setting(
        None, "levels of the training problems; null: the protocol's"
    )


class Math(PublicTask):
    """Competition problems with a LaTeX answer."""

    name = "math"
    options_type = MathOptions
    options: MathOptions
    datasets = {
        "train": {"agrpo": "qwedsacf/competition_math", "d1": "ankner/math-500"},
        "eval": dict.fromkeys(benchmarks.PROTOCOLS, "HuggingFaceH4/MATH-500"),
    }
    selection_fix = "give task.options.levels that it has, or another file"

    def make_problem(self, row: dict[str, Any]) -> Problem:
        """Read one row; without a column `answer`, AGRPO's gold answer is the first box."""
        problem = super().make_problem(row)
        if self.options.protocol == "agrpo" and optional_column(row, "answer") is None:
            answer = answer_column({"answer": boxed(problem.fields["rationale"])}, "answer")
            fields = {**problem.fields, "answer": answer}
            return replace(problem, fields=fields, solution=self.solution(fields))
        return problem

    def select(self, split: Split, problems: list[Problem]) -> list[Problem]:
        """Return the problems; in training only those of the chosen levels."""
        levels = self.options.levels or ([1, 2, 3, 4] if self.options.protocol == "agrpo" else None)
        if split == "train" and levels is not None:
            # A problem without a level is kept.
            return [p for p in problems if p.fields["level"] in (None, *levels)]
        return problems
