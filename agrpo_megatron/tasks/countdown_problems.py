"""Generated Countdown problems: all solvable ones, or a random sample of a large space."""

import functools
import itertools
import math
import operator
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from agrpo_megatron.tasks.base import distinct
from agrpo_megatron.types import Problem

MAX_ENUMERATED = 2_500_000  # expressions, some seconds; a larger space is sampled
NUMBER, PRODUCT, SUM = range(3)  # how loosely an expression binds
SIGNS = "+-*/"


class Rules(NamedTuple):
    """Rules of generation; the defaults are for the published problems, without a range."""

    numbers: int
    low: int = 0
    high: int = 0
    operators: str = SIGNS
    parentheses: bool = True


class Expression(NamedTuple):
    """An expression without redundant parentheses."""

    text: str
    value: int
    level: int  # NUMBER, PRODUCT or SUM


def make_problems(rng: random.Random, wanted: int, *, rules: Rules) -> list[Problem]:
    """Return up to `wanted` different problems; every division is exact at every step."""
    if _space(rules) <= MAX_ENUMERATED:
        return _enumerate_problems(rng, wanted, rules=rules)
    return distinct(_draw_problems(rng, 30 * wanted, rules=rules), wanted)


def make_series(rng: random.Random, wanted: int, *, rules: Rules, length: int) -> list[Problem]:
    """Return up to `wanted` different series of `length` problems, solutions with spaces between.

    A problem comes up in many series, each time with another of its solutions.
    """
    drawn = _draw_problems(rng, 30 * wanted * length, rules=rules)
    series = (
        Problem(
            ", ".join(problem.key for problem in chosen),
            {"series": [problem.fields for problem in chosen]},
            " ".join(problem.solution for problem in chosen),
        )
        for chosen in itertools.batched(drawn, length)
        if len(chosen) == length
    )
    return distinct(series, wanted)


def problem_key(numbers: Sequence[int], target: int) -> str:
    """Return the identity of a problem: the numbers in any order, and the target."""
    return f"{' '.join(map(str, sorted(numbers)))} = {target}"


def solve(numbers: Sequence[int], target: int, *, rules: Rules | None = None) -> str:
    """Return an expression over exactly `numbers` with the value `target`; empty if none exists."""
    found = _expressions(tuple(sorted(numbers)), {}, rules=rules or Rules(len(numbers)))
    return next((text for text, value, _ in found if value == target), "")


def _space(rules: Rules) -> int:
    """Estimate the number of expressions of a full enumeration."""
    n = rules.numbers
    choices = math.comb(rules.high - rules.low + n, n)
    shapes = n - 1 if rules.parentheses else 1
    return choices * math.factorial(n) * len(rules.operators) ** (n - 1) * shapes


def _enumerate_problems(rng: random.Random, wanted: int, *, rules: Rules) -> list[Problem]:
    """Return `wanted` problems, uniform over all solvable ones, or all if fewer exist."""
    memo: dict[tuple[int, ...], list[Expression]] = {}
    solved: list[tuple[tuple[int, ...], int, str]] = []
    span = range(rules.low, rules.high + 1)
    for numbers in itertools.combinations_with_replacement(span, rules.numbers):
        texts: dict[int, list[str]] = {}
        for text, value, _ in _expressions(numbers, memo, rules=rules):
            if value > 0:
                texts.setdefault(value, []).append(text)
        solved += [(numbers, value, rng.choice(same)) for value, same in texts.items()]
    rng.shuffle(solved)
    return [_make_problem(rng, n, target=t, solution=text) for n, t, text in solved[:wanted]]


def _draw_problems(rng: random.Random, draws: int, *, rules: Rules) -> Iterator[Problem]:
    """Yield the problems of `draws` random expressions; some have none."""
    for _ in range(draws):
        numbers = rng.choices(range(rules.low, rules.high + 1), k=rules.numbers)
        signs = rng.choices(rules.operators, k=rules.numbers - 1)
        drawn = _draw_expression(rng, numbers, signs=signs, parentheses=rules.parentheses)
        if drawn is not None and drawn.value > 0:
            yield _make_problem(rng, numbers, target=drawn.value, solution=drawn.text)


def _make_problem(
    rng: random.Random, numbers: Sequence[int], *, target: int, solution: str
) -> Problem:
    # Random order: in sorted numbers the position would determine the sign of a difference.
    shown = rng.sample(numbers, len(numbers))
    return Problem(problem_key(numbers, target), {"numbers": shown, "target": target}, solution)


def _expressions(
    numbers: tuple[int, ...], memo: dict[tuple[int, ...], list[Expression]], *, rules: Rules
) -> list[Expression]:
    """Return every expression over exactly `numbers` (sorted); `memo` caches subsets."""
    if numbers in memo:
        return memo[numbers]
    if len(numbers) == 1:
        return [Expression(str(numbers[0]), numbers[0], NUMBER)]
    found: dict[str, Expression] = {}
    for left, right in _splits(numbers):
        sides = [_expressions(side, memo, rules=rules) for side in (left, right)]
        for pair, sign in itertools.product(itertools.product(*sides), rules.operators):
            joined = _join(*pair, sign=sign, parentheses=rules.parentheses)
            if joined is not None:
                found[joined.text] = joined
    if len(numbers) < rules.numbers:
        memo[numbers] = list(found.values())
    return list(found.values())


def _splits(numbers: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the divisions of `numbers` into a left and a right side, neither empty."""
    choices = itertools.product((True, False), repeat=len(numbers))
    left = [tuple(itertools.compress(numbers, chosen)) for chosen in choices][1:-1]
    # Each choice is the opposite of the one at the same distance from the end.
    return list(dict.fromkeys(zip(left, reversed(left), strict=True)))


def _draw_expression(
    rng: random.Random,
    numbers: Sequence[int],
    *,
    signs: Sequence[str],
    parentheses: bool,
    barred: int = NUMBER,
) -> Expression | None:
    """Build an expression from numbers and the signs between them; its level is not `barred`.

    None if a division is not exact.
    """
    if not signs:
        return Expression(str(numbers[0]), numbers[0], NUMBER)
    levels = [SUM if sign in "+-" else PRODUCT for sign in signs]
    # The right side of a cut must be a number, or of a level that `_join` accepts there.
    cuts = [i for i, level in enumerate(levels) if {*levels[i + 1 :]} != {level}]
    if not parentheses:
        cuts = [max(range(len(signs)), key=lambda i: (levels[i], i))]
    cut = rng.choice([i for i in cuts if levels[i] != barred])
    draw = functools.partial(_draw_expression, rng, parentheses=parentheses)
    left = draw(numbers[: cut + 1], signs=signs[:cut])
    right = draw(numbers[cut + 1 :], signs=signs[cut + 1 :], barred=levels[cut])
    if left is None or right is None:
        return None
    return _join(left, right, sign=signs[cut], parentheses=parentheses)


def _join(
    left: Expression, right: Expression, *, sign: str, parentheses: bool
) -> Expression | None:
    """Join two expressions; None if the result has no value or a simpler form."""
    level = SUM if sign in "+-" else PRODUCT
    # a-(b+c) is a-b-c and a*(b*c) is a*b*c: the same problem without the parentheses.
    if right.level == level:
        return None
    wrapped = level == PRODUCT and SUM in (left.level, right.level)
    value = _apply(left.value, right.value, sign=sign)
    if value is None or (wrapped and not parentheses):
        return None
    sides = [f"({e.text})" if wrapped and e.level == SUM else e.text for e in (left, right)]
    return Expression(sign.join(sides), value, level)


def _apply(left: int, right: int, *, sign: str) -> int | None:
    if sign == "/":
        return left // right if right and left % right == 0 else None
    return {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](left, right)
