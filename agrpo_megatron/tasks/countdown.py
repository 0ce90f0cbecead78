"""Countdown: write an expression that uses each given number once and equals the target.

Arithmetic is exact: a division has to come out whole at every step.
"""

import ast
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agrpo_megatron.config import setting
from agrpo_megatron.settings import TaskSettings
from agrpo_megatron.tasks.generated import Split, split_problems
from agrpo_megatron.types import Problem, Reward

LONGEST_EXPRESSION = 200  # characters; longer text is wrong without being parsed
MOST_ENUMERATED = 2_500_000  # expressions, some seconds; a larger space is drawn from
NUMBER, PRODUCT, SUM = range(3)  # how loosely an expression binds
SIGNS: dict[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


@dataclass(frozen=True)
class CountdownOptions:
    """Options of the Countdown task."""

    numbers: int = setting(3, "numbers given", low=2, high=6)
    low: int = setting(1, "smallest number given", low=1, high=999)
    high: int = setting(9, "largest number given", low=1, high=999)
    operators: str = setting("+-*", "operators allowed, out of + - * /; division has to be exact")
    parentheses: bool = setting(False, "allow parentheses, and give problems that need them")
    partial_credit: float = setting(
        0.0, "score of an expression over exactly the given numbers with the wrong value", low=0
    )

    def __post_init__(self) -> None:
        if self.high < self.low:
            raise ValueError(
                f"task.options.high={self.high} is below task.options.low={self.low}; "
                f"use at least {self.low}"
            )
        known = set(self.operators) <= set(SIGNS.values())
        if not known or not self.operators or len(set(self.operators)) < len(self.operators):
            raise ValueError(
                f"task.options.operators={self.operators} must name some of + - * /, each once; "
                'use for example "+-*"'
            )
        if self.partial_credit >= 1:
            raise ValueError(
                f"task.options.partial_credit={self.partial_credit} must be below the 1 of a "
                "right answer; use for example 0.1"
            )


class Expression(NamedTuple):
    """An expression with no parentheses but those it needs."""

    text: str
    value: int
    level: int  # NUMBER, PRODUCT or SUM


class Countdown:
    """Reach a target with a few numbers, written as one expression."""

    name = "countdown"
    options_type = CountdownOptions

    def __init__(self, settings: TaskSettings, options: CountdownOptions):
        self.options = options
        rng = random.Random(f"countdown {settings.seed}")
        wanted = settings.train_problems + settings.eval_problems
        draw = _enumerate_problems if _space(options) <= MOST_ENUMERATED else _draw_problems
        self._splits = split_problems(
            draw(rng, wanted, options=options), settings, wider="raise task.options.high"
        )

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of a split; no numbers with one target are in both."""
        return self._splits[split]

    def prompt(self, problem: Problem) -> str:
        """Return the numbers and the target, such as `3 5 7 = 22:`."""
        numbers = " ".join(map(str, problem.fields["numbers"]))
        return f"{numbers} = {problem.fields['target']}:"

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Grade an expression; `numbers` is 1 where it uses exactly the given numbers."""
        value = _evaluate(completion.strip(), problem.fields["numbers"], options=self.options)
        if value is None:
            return Reward(0.0, False, {"numbers": 0.0, "value": 0.0})
        correct = value == problem.fields["target"]
        score = 1.0 if correct else self.options.partial_credit
        return Reward(score, correct, {"numbers": 1.0, "value": float(correct)})


def _evaluate(text: str, numbers: Sequence[int], *, options: CountdownOptions) -> int | None:
    """Return the value of an expression over exactly `numbers`, or None for any other text."""
    legal = "0123456789" + options.operators + ("()" if options.parentheses else "")
    if len(text) > LONGEST_EXPRESSION or not set(text) <= set(legal):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    used = [value for value in constants if isinstance(value, int)]
    if sorted(used) != sorted(numbers):  # also what bounds every value below
        return None
    return _value(tree)


def _value(node: ast.expr) -> int | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if not isinstance(node, ast.BinOp) or type(node.op) not in SIGNS:
        return None
    left, right = _value(node.left), _value(node.right)
    if left is None or right is None:
        return None
    return _apply(left, right, sign=SIGNS[type(node.op)])


def _apply(left: int, right: int, *, sign: str) -> int | None:
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    return left // right if right and left % right == 0 else None


def _space(options: CountdownOptions) -> int:
    """Return about how many expressions listing them all would make."""
    n = options.numbers
    choices = math.comb(options.high - options.low + n, n)
    shapes = n - 1 if options.parentheses else 1
    return choices * math.factorial(n) * len(options.operators) ** (n - 1) * shapes


def _enumerate_problems(
    rng: random.Random, wanted: int, *, options: CountdownOptions
) -> list[Problem]:
    """Return `wanted` problems, uniform over all solvable ones, or all where fewer exist."""
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


def _draw_problems(rng: random.Random, wanted: int, *, options: CountdownOptions) -> list[Problem]:
    """Return `wanted` problems made from random expressions; fewer where most are alike."""
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
    key = f"{' '.join(map(str, sorted(numbers)))} = {target}"
    # Shown in random order: sorted numbers would make the sign of a difference a matter of place.
    shown = rng.sample(numbers, len(numbers))
    return Problem(key, {"numbers": shown, "target": target}, solution)


def _expressions(
    numbers: tuple[int, ...],
    memo: dict[tuple[int, ...], list[Expression]],
    *,
    options: CountdownOptions,
) -> list[Expression]:
    """Return every expression over exactly `numbers` (sorted), remembering those of parts."""
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
    """Yield the ways to deal `numbers` to a left and a right side, neither empty."""
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
    """Shape numbers and the signs between them into an expression of a level not `barred`.

    None where a division does not come out whole.
    """
    if not signs:
        return Expression(str(numbers[0]), numbers[0], NUMBER)
    levels = [SUM if sign in "+-" else PRODUCT for sign in signs]
    # To the right of a cut has to be a number, or a level that `_join` takes there.
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
    """Join two expressions; None for what has no value or is written more simply elsewhere."""
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
