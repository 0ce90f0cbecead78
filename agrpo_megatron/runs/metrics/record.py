"""The record of a metric, and the phases that log it."""

from dataclasses import dataclass

SFT, RL, EVAL = ("sft",), ("rl",), ("eval",)
UPDATED, GRADED, ALL = ("sft", "rl"), ("rl", "eval"), ("sft", "rl", "eval")


@dataclass(frozen=True)
class Metric:
    """One metric, or the metrics of a pattern: <PART> in a name stands for any text."""

    name: str
    phases: tuple[str, ...]
    meaning: str
    unit: str = ""
    healthy: str = ""  # the value of a run that learns, where one is known
