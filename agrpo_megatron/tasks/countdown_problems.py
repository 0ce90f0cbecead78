"""Generated Countdown problems: all solvable ones, or a random sample of a large space."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from agrpo_megatron.types import Problem

MAX_ENUMERATED = 2_500_000  # expressions, some seconds; a larger space is sampled
NUMBER, PRODUCT, SUM = range(3)  # how loosely an expression binds
SIGNS = "+-*/"


class Rules(Protocol):
    """Rules of generation; the task's options have these attributes."""

    @property
    def numbers(self) -> int: ...
    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...
    @property
    def operators(self) -> str: ...
    @property
    def parentheses(self) -> bool: ...


class Expression(NamedTuple):
    """An expression without redundant parentheses."""

    text: str
    value: int
    level: int  # NUMBER, PRODUCT or SUM


def make_problems(rng: random.Random, wanted: int, *, options: Rules) -> list[Problem]:
    """Return up to `wanted` different problems; every division is exact at every step."""
    draw = _enumerate_problems if _space(options) <= MAX_ENUMERATED else _draw_problems
    return draw(rng, wanted, options=options)


class _AllRules(NamedTuple):
    """The rules of the published problems."""

    numbers: int
    low: int = 0
    high: int = 0
    operators: str = SIGNS
    parentheses: bool = True


def problem_key(numbers: Sequence[int], target: int) -> str:
    """Return the identity of a problem: the numbers in any order, and the target."""
    return f"{' '.join(map(str, sorted(numbers)))} = {target}"


def solve(numbers: Sequence[int], target: int) -> str:
    """Return an expression over exactly `numbers` with the value `target`; empty if none exists."""
    rules = _AllRules(len(numbers))
    found = _expressions(tuple(sorted(numbers)), {}, options=rules)
    return next((text for text, value, _ in found if value == target), "")


def _space(options: Rules) -> int:
    """Estimate the number of expressions of a full enumeration."""
    n = options.numbers
    choices = math.comb(options.high - options.low + n, n)
    shapes = n - 1 if options.parentheses else 1
    return choices * math.factorial(n) * len(options.operators) ** (n - 1) * shapes


def _enumerate_problems(rng: random.Random, wanted: int, *, options: Rules) -> list[Problem]:
    """Return `wanted` problems, uniform over all solvable ones, or all if fewer exist."""
    memo: dict[tuple[int, ...], list[Expression]] = {}
    solved: list[tuple[tuple[int, ...], int, str]] = []
    span = range(options.low, options.high + 1)
    for numbers in itertools.combinations_with_replacement(span, options.numbers):
        texts: dict[int, list[str]] = {}
        for text, value, _ in _expressions(numbers, memo, options=options):
            if value > 0:
                texts.setdefault(value, []).append(text)
        solved += [(numbers, value, rng.choice(same)) for value, same in texts.items()]
    rng.shuffle(solved)
    return [
        _make_problem(rng, numbers, target=target, solution=solution)
        for numbers, target, solution in solved[:wanted]
    ]


def _draw_problems(rng: random.Random, wanted: int, *, options: Rules) -> list[Problem]:
    """Return `wanted` problems from random expressions; fewer if too many draws repeat."""
    chosen: dict[str, Problem] = {}
    for _ in range(30 * wanted):
        numbers = rng.choices(range(options.low, options.high + 1), k=options.numbers)
        signs = rng.choices(options.operators, k=options.numbers - 1)
        drawn = _draw_expression(rng, numbers, signs=signs, parentheses=options.parentheses)
        if drawn is None or drawn.value <= 0:
            continue
        problem = _make_problem(rng, numbers, target=drawn.value, solution=drawn.text)
        chosen.setdefault(problem.key, problem)
        if len(chosen) == wanted:
            break
    return list(chosen.values())


def _make_problem(
    rng: random.Random, numbers: Sequence[int], *, target: int, solution: str
) -> Problem:
    # Random order: in sorted numbers the position would determine the sign of a difference.
    shown = rng.sample(numbers, len(numbers))
    return Problem(problem_key(numbers, target), {"numbers": shown, "target": target}, solution)


def _expressions(
    numbers: tuple[int, ...],
    memo: dict[tuple[int, ...], list[Expression]],
    *,
    options: Rules,
) -> list[Expression]:
    """Return every expression over exactly `numbers` (sorted); `memo` caches subsets."""
    if numbers in memo:
        return memo[numbers]
    if len(numbers) == 1:
        return [Expression(str(numbers[0]), numbers[0], NUMBER)]
    found: dict[str, Expression] = {}
    for left, right in _splits(numbers):
        sides = [_expressions(side, memo, options=options) for side in (left, right)]
        for pair, sign in itertools.product(itertools.product(*sides), options.operators):
            joined = _join(*pair, sign=sign, parentheses=options.parentheses)
            if joined is not None:
                found[joined.text] = joined
    if len(numbers) < options.numbers:
        memo[numbers] = list(found.values())
    return list(found.values())


def _splits(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the divisions of `numbers` into a left and a right side, neither empty."""
    sides = itertools.product((True, False), repeat=len(numbers))
    dealt = (
        (
            tuple(itertools.compress(numbers, side)),
            tuple(itertools.compress(numbers, (not left for left in side))),
        )
        for side in sides
    )
    return iter(dict.fromkeys((left, right) for left, right in dealt if left and right))


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
    left = _draw_expression(rng, numbers[: cut + 1], signs=signs[:cut], parentheses=parentheses)
    right = _draw_expression(
        rng,
        numbers[cut + 1 :],
        signs=signs[cut + 1 :],
        parentheses=parentheses,
        barred=levels[cut],
    )
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
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    return left // right if right and left % right == 0 else None
