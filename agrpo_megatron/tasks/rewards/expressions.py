"""Arithmetic expressions amid other text: LaTeX, Markdown, words."""

import re
from collections.abc import Sequence

from agrpo_megatron.tasks.rewards.arithmetic import evaluate, has_other_operators, same_numbers

CLOSE = 1e-9  # rounding of an exact value
LONGEST = 5000  # characters that are looked at
_DELIMITERS = re.compile(r"\\(?:left|right|[()\[\],!;: ])|\$")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_IMPLIED = re.compile(r"(?<=[\d)])\s*(?=\()|(?<=\))\s*(?=\d)")  # a product without a sign
_OPERATORS = (
    (r"\times", "*"),
    (r"\cdot", "*"),
    (r"\div", "/"),
    ("\u00d7", "*"),
    ("\u00f7", "/"),
    ("\u2212", "-"),
)


def reaches(text: str, target: int) -> bool:
    """Say whether a text is an expression of + - * / alone that has the value `target`."""
    value = None if has_other_operators(text) else evaluate(text)
    return value is not None and abs(value - target) < CLOSE


def holds_solution(text: str, numbers: Sequence[int], *, target: int) -> bool:
    """Say whether an expression over exactly `numbers` that reaches `target` stands in a text."""
    if len(text) > LONGEST:
        return False
    text = _DELIMITERS.sub(" ", text)
    for _ in range(4):  # fractions within fractions
        text = _FRACTION.sub(r"((\1)/(\2))", text)
    for written, operator in _OPERATORS:
        text = text.replace(written, operator)
    text = _IMPLIED.sub("*", re.sub(r"\s+", " ", text))
    runs = re.findall(r"[\d+\-*/(). ]+", text)
    return any(same_numbers(run, numbers) and reaches(_trimmed(run), target) for run in runs)


def _trimmed(run: str) -> str:
    """Take off what the ends of an expression cannot be, such as the stars of bold text."""
    run = run.lstrip("*/). ").rstrip("+-*/(. ")
    if run.count("(") > run.count(")"):
        return run.removeprefix("(")
    return run.removesuffix(")") if run.count(")") > run.count("(") else run
