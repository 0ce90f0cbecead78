"""Exact values of arithmetic that a model wrote: parsed, never executed."""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction

LONGEST = 2000  # characters; longer text has no value, without being parsed
OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(text: str) -> Fraction | None:
    """Return the value of an expression of numbers, + - * / and parentheses; None for other text.

    Also None where it divides by zero. Powers and floor divisions have no value here, so that the
    size of every intermediate number is bounded by the length of the text.
    """
    text = text.strip()
    tree = _parse(text)
    try:
        return None if tree is None else _value(tree, text)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None


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


def _parse(text: str) -> ast.expr | None:
    if len(text) > LONGEST or not re.fullmatch(r"[0-9+\-*/().\s]+", text):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(ast.get_source_segment(text, node) or "")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, text), _value(node.right, text))
    raise ValueError("not arithmetic")


def _whole_value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATIONS:
        raise ValueError("not arithmetic")
    left, right = Fraction(_whole_value(node.left)), Fraction(_whole_value(node.right))
    value = OPERATIONS[type(node.op)](left, right)
    if value.denominator != 1:
        raise ValueError("a division does not come out whole")
    return int(value)
