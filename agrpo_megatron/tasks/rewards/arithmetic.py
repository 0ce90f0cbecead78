"""Values of arithmetic that a model wrote: parsed, never executed."""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

LONGEST = 5000  # characters, runs of blanks and signs not counted; longer text has no value
MOST_SIGNS = 2900  # Python compiles no more nested signs either
MOST_BITS = 15_000  # of a power of whole numbers; a larger one has no value
DIGITS = 4300  # in a row; Python reads no longer ones

type Number = int | float | complex

WHOLE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(text: str) -> Number | None:
    """Return the value that Python gives an expression of numbers, signs and parentheses.

    None for other text, where it divides by zero, and where a power is out of bounds.
    """
    text = re.sub(r"[ \t]{2,}", " ", text.strip())
    if text.count("-") + text.count("+") > MOST_SIGNS:
        return None
    tree = _parse(re.sub(r"([-+])((?: ?[-+])+)", _two_signs, text))
    try:
        return None if tree is None else _value(tree)
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return None


def has_other_operators(text: str) -> bool:
    """Say whether an expression goes beyond + - * /: powers and floor divisions."""
    return "**" in text or "//" in text


def evaluate_whole(text: str, numbers: Sequence[int]) -> int | None:
    """Return the value of an expression over exactly `numbers`; None for any other text.

    Also None with a sign before a number, and where a division does not come out whole.
    """
    tree = _parse(text)
    if tree is None:
        return None
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    used = [value for value in constants if isinstance(value, int)]
    if len(used) < len(constants) or sorted(used) != sorted(numbers):
        return None
    try:
        return _whole_value(tree)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None


def same_numbers(text: str, numbers: Sequence[int]) -> bool:
    """Say whether the runs of digits in `text` are exactly `numbers`, in any order."""
    found = re.findall(r"\d+", text)
    if len(found) != len(numbers) or any(len(run) > DIGITS for run in found):
        return False
    return sorted(map(int, found)) == sorted(numbers)


def _two_signs(run: re.Match[str]) -> str:
    """Shorten a run of signs: the first may stand between two values, the others are before one."""
    return run[1] + ("-" if run[2].count("-") % 2 else "+")


def _parse(text: str) -> ast.expr | None:
    if len(text) > LONGEST or not re.fullmatch(r"[0-9+\-*/().\s]+", text):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


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
    if whole and base.bit_length() * exponent > MOST_BITS:
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
        raise ValueError("a division does not come out whole")
    return int(value)


OPERATIONS = {**WHOLE, ast.FloorDiv: operator.floordiv, ast.Pow: _power}
