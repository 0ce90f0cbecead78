"""Arithmetic against Python's evaluation, and expressions within other text."""

import random
import re
import warnings

import pytest

from agrpo_megatron.tasks.countdown_problems import solve
from agrpo_megatron.tasks.rewards.arithmetic import (
    contains_solution,
    evaluate,
    evaluate_whole,
    has_value,
    same_numbers,
)

PIECES = ("3", "4", "12", "0", ".5", "+", "-", "*", "/", "//", "(", ")", " ", "\n", "--", "-+-")


def python_value(text):
    """Evaluate by Python; bounded, since the pieces have no power."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = eval(text, {"__builtins__": None}, {})
    except (SyntaxError, TypeError, ArithmeticError):
        return None
    return value if isinstance(value, int | float) else None


def test_values_are_those_of_python():
    chance = random.Random(0)
    valued = 0
    for _ in range(20_000):
        text = "".join(chance.choices(PIECES, k=chance.randint(1, 8))).strip()
        if "**" in text:  # of neighbouring pieces
            continue
        value = evaluate(text)
        assert repr(value) == repr(python_value(text)), text
        valued += value is not None
    assert valued > 2000


@pytest.mark.parametrize(
    "text, value",
    [
        ("2**10", 1024),
        ("2**-1", 0.5),
        ("(-8)**(1/3)", (-8) ** (1 / 3)),
        ("9**9**9", None),
        ("2**15001", None),
        ("1/0", None),
        ("0**-1", None),
        ("-" * 2001 + "1", -1),
        ("1" + " " * 100_000 + "+1", 2),
        ("-" * 3000 + "1", None),
        ("(" * 100 + "7" + ")" * 100, 7),
        ("(" * 1000 + "7" + ")" * 1000, None),
        ("1_000", None),
        ("1e3", None),
        ("0x10", None),
        ("\u0663+1", None),
        ("abs(1)", None),
        ("1,2", None),
        ("1 if 1 else 2", None),
        ("", None),
    ],
)
def test_what_is_out_of_bounds_has_no_value(text, value):
    assert evaluate(text) == value


def test_whole_values_use_the_numbers_and_divide_exactly():
    assert evaluate_whole("6*4/3", [3, 4, 6]) == 8
    assert evaluate_whole("4/3*6", [3, 4, 6]) is None
    assert evaluate_whole("6*4", [3, 4, 6]) is None
    assert evaluate_whole("-3+4+6", [3, 4, 6]) is None


@pytest.mark.parametrize(
    "text, holds",
    [
        ("30-100+93", True),
        ("so **30 - (100 - 93)** it is", True),
        (r"\left(30-100\right)+93", True),
        ("`30-100+93`", True),
        ("30, 100, 93 make 23", False),
        ("30-100 and +93", False),
        (r"\frac{30}{100}93", False),
        ("30+100-93", False),
    ],
)
def test_expressions_are_found_amid_other_text(text, holds):
    assert contains_solution(text, [30, 100, 93], target=23) == holds


@pytest.mark.parametrize(
    "text", [r"\frac{90 \cdot 43}{90}", r"43 \times \frac{90}{90}", "(43)(90/90)"]
)
def test_expressions_are_found_in_latex(text):
    assert contains_solution(text, [90, 43, 90], target=43)


def test_every_solution_that_is_found_solves():
    chance = random.Random(0)
    found = 0
    for _ in range(100):
        numbers = chance.choices(range(1, 20), k=3)
        target = chance.randint(1, 60)
        solution = solve(numbers, target)
        assert not solution or (has_value(solution, target) and same_numbers(solution, numbers))
        found += bool(solution)
    assert found > 10
    assert re.fullmatch(r"[\d+*/()-]+", solve([30, 100, 93], 23))
    assert solve([1, 1, 1], 50) == ""
