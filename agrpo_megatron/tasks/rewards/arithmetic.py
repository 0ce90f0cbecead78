"""Arithmetic in the text of a model: parsed, never executed."""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

MAX_CHARACTERS = 5000  # longer text has no value; runs of blanks or signs in it count once
MAX_SIGNS = 2900  # the limit of Python's compiler for nested signs
MAX_BITS = 15_000  # of an integer power; a larger one has no value
MAX_DIGITS = 4300  # of one number; Python's own limit
TOLERANCE = 1e-9  # for the rounding of an exact value

type Number = int | float | complex

WHOLE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_DELIMITERS = re.compile(r"\\(?:left|right|[()\[\],!;: ])|\$")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_IMPLIED = re.compile(r"(?<=[\d)])\s*(?=\()|(?<=\))\s*(?=\d)")  # a product without a sign


def evaluate(text: str) -> Number | None:
    """Return Python's value of an expression of numbers, signs and parentheses.

    None for other text, for a division by zero, and for a power out of bounds.
    """
    text = re.sub(r"[ \t]{2,}", " ", text.strip())
    if text.count("-") + text.count("+") > MAX_SIGNS:
        return None
    try:
        return _value(_parse(re.sub(r"([-+])((?: ?[-+])+)", _two_signs, text)))
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return None


def evaluate_whole(text: str, numbers: Sequence[int]) -> int | None:
    """Return the value of an expression over exactly `numbers`; None for any other text.

    Also None for a sign before a number, and for a division that is not exact.
    """
    try:
        tree = _parse(text)
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        used = [value for value in constants if isinstance(value, int)]
        return _whole_value(tree) if sorted(used) == sorted(numbers) else None
    except (ValueError, ZeroDivisionError, RecursionError):
        return None


def same_numbers(text: str, numbers: Sequence[int]) -> bool:
    """Return whether the runs of digits in `text` are exactly `numbers`, in any order."""
    found = re.findall(r"\d+", text)
    if len(found) != len(numbers) or any(len(run) > MAX_DIGITS for run in found):
        return False
    return sorted(map(int, found)) == sorted(numbers)


def has_value(text: str, target: int, *, tolerance: float = TOLERANCE) -> bool:
    """Return whether a text is an expression of + - * / with the value `target`."""
    has_others = "**" in text or "//" in text  # powers, floor divisions
    value = None if has_others else evaluate(text)
    return value is not None and abs(value - target) < tolerance


def contains_solution(text: str, numbers: Sequence[int], *, target: int) -> bool:
    """Return whether a text (LaTeX, Markdown, words) has an expression that solves a problem.

    The expression uses exactly `numbers` and has the value `target`.
    """
    if len(text) > MAX_CHARACTERS:
        return False
    text = _DELIMITERS.sub(" ", text)
    for _ in range(4):  # fractions within fractions
        text = _FRACTION.sub(r"((\1)/(\2))", text)
    text = re.sub(r"\\times|\\cdot|\u00d7", "*", text)
    text = re.sub(r"\\div|\u00f7", "/", text).replace("\u2212", "-")
    text = _IMPLIED.sub("*", re.sub(r"\s+", " ", text))
    runs = re.findall(r"[\d+\-*/(). ]+", text)
    return any(same_numbers(run, numbers) and has_value(_trimmed(run), target) for run in runs)


def _trimmed(run: str) -> str:
    """Remove what cannot begin or end an expression, such as the stars of bold text."""
    run = run.lstrip("*/). ").rstrip("+-*/(. ")
    if run.count("(") > run.count(")"):
        return run.removeprefix("(")
    return run.removesuffix(")") if run.count(")") > run.count("(") else run


def _two_signs(run: re.Match[str]) -> str:
    """Shorten a run of signs: the first may be binary, the others are unary."""
    return run[1] + ("-" if run[2].count("-") % 2 else "+")


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_CHARACTERS or not re.fullmatch(r"[0-9+\-*/().\s]+", text):
        raise ValueError("not arithmetic")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("not arithmetic") from None


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")


def _power(base: Any, exponent: Any) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and base.bit_length() * exponent > MAX_BITS:
        raise OverflowError
    return base**exponent


def _whole_value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if not isinstance(node, ast.BinOp) or type(node.op) not in WHOLE:
        raise ValueError("not arithmetic")
    left, right = Fraction(_whole_value(node.left)), Fraction(_whole_value(node.right))
    value = WHOLE[type(node.op)](left, right)
    if value.denominator != 1:
        raise ValueError("a division is not exact")
    return int(value)


OPERATIONS = {**WHOLE, ast.FloorDiv: operator.floordiv, ast.Pow: _power}
