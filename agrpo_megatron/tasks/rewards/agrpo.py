"""The rewards and verdicts of AGRPO's published code, by their published names.

Every function takes a completion and the problem's fields. The values equal the published ones,
except where the published code executes text, hangs, raises or rejects a right answer;
docs/tasks.md lists each exception. Source: github.com/probablyabot/agrpo, rewards.py and eval.py.
"""

import re
import unicodedata
from collections.abc import Callable

from agrpo_megatron.tasks.rewards.arithmetic import (
    contains_solution,
    evaluate,
    has_value,
    same_numbers,
)
from agrpo_megatron.tasks.rewards.equivalence import equal, equal_in_text
from agrpo_megatron.tasks.rewards.extract import CELLS, Fields, boxed, cells_right, share, tagged

MAX_PLAIN = 200  # characters of a plain expression
# Digits with thousands commas and decimals; a number has a sign before them. Nested roots are not
# read, as in the published code.
_DIGITS = r"(?>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
_NUMBER = re.compile(
    r"(?P<no>(?<!{)\\sqrt\W{0,3}|\b(?:negative|minus)\W{0,3}|[\u2212-]\\?\$)?"  # changes its value
    r"(?:(?<![\w.)\]}\u2212-])[\u2212-][\s({]{0,3})?" + _DIGITS
)
# What joins the number before it to another: a sign, a word, a power, a fraction, or a blank.
_JOINED = re.compile(
    r"[^\S\n]*(?:[-+*/^\u2212]+|\\(?:times|cdot|div|pm)\b|[xX]|plus|minus|times|over)"
    r"[^\S\n]*[({\\$]*\.?\d|[^\S\n]*(?:\\[dt]?frac|\\over)\W*\d|[)}]\s*[({]\s*\d"
    r"|[,:'\u2019]\d|[eE][-+]?\d|[^\S\n]+(?:\$?\.?\d|and\s+(?:\d+/|\w+\s+(?:half|third|quarter)))"
)
# Only numbers, with blanks, commas or words between them: none is the answer.
_LIST = re.compile(
    rf"[\s$(\[{{]*{_DIGITS}(?:(?:\s*(?:[,;&]|\b(?:and|or|to)\b)|\s)\s*\$?{_DIGITS})+[\s.$)\]}}]*"
)
# Signs that math-verify skips, in LaTeX.
_LATEX = {"\u00d7": r"\times ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u00f7": "/"}
_LATEX |= {"\u00b2": "^{2}", "\u00b3": "^{3}"}
for _sign in map(chr, (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F))):  # fractions, such as one half
    _top, _bottom = unicodedata.normalize("NFKC", _sign).split("\u2044")
    _LATEX[_sign] = rf"\frac{{{_top}}}{{{_bottom}}}"


def parse_answer(text: str) -> str:
    r"""Return the content of the first `\boxed` in the first answer block, else the whole block.

    Without an answer block, the whole text is the block.
    """
    inner = tagged(text, "answer")
    inner = text if inner is None else inner
    return boxed(inner) or inner


def thinking_format_reward(text: str, _fields: Fields) -> float:
    """Return 0.5 for a block of thoughts."""
    return 0.5 * (tagged(text, "think") is not None)


def answer_format_reward(text: str, _fields: Fields) -> float:
    """Return 0.5 for an answer block."""
    return 0.5 * (tagged(text, "answer") is not None)


def correctness_reward(text: str, fields: Fields) -> float:
    """Return 3 if math-verify finds the answer equal to the gold answer."""
    return 3.0 * equal(fields["answer"], parse_answer(text))


def countdown_format_reward(text: str, fields: Fields) -> float:
    """A third each for the right side, the characters and the numbers; -0.5 for a second `=`."""
    answer = tagged(text, "answer")
    if answer is None or "=" not in answer:
        return 0.0
    sides = answer.split("=")
    left, right = sides[0].strip(), sides[-1].strip()
    thirds = [
        same_numbers(right, [fields["target"]]) and right.isdecimal(),
        re.fullmatch(r"[\d\s+\-*/()]+", left) is not None,
        same_numbers(left, fields["numbers"]),
    ]
    return sum(1 / 3 for third in thirds if third) - 0.5 * (len(sides) > 2)


def countdown_correctness_reward(text: str, fields: Fields) -> float:
    """Return 3 for an answer block with an equation; its left side must solve the problem."""
    answer = tagged(text, "answer")
    return 3.0 * (answer is not None and _solves(answer, fields))


def sudoku_format_reward(text: str, fields: Fields) -> float:
    """Return 0.25 for 16 characters, 0.25 for four of each digit, 0.5 for unchanged clues."""
    grid = tagged(text, "answer")
    if grid is None or len(grid) != CELLS:
        return 0.0
    puzzle = fields["puzzle"]
    kept = all(clue in ("0", cell) for clue, cell in zip(puzzle, grid, strict=True))
    return 0.25 + 0.25 * (sorted(grid) == sorted("1234" * 4)) + 0.5 * kept


def sudoku_correctness_reward(text: str, fields: Fields) -> float:
    """Return 3 times the share of empty cells that are right."""
    return 3.0 * sudoku_share(text, fields)


def sudoku_share(text: str, fields: Fields) -> float:
    """Return the share of empty cells that are right; 0 for a puzzle without empty cells."""
    return share(*sudoku_cells(text, fields))


def sudoku_cells(text: str, fields: Fields) -> tuple[int, int]:
    """Return the number of right and of all empty cells; zeros pad a short grid on the left."""
    grid = parse_answer(text).zfill(CELLS)[:CELLS]
    return cells_right(grid, fields["puzzle"], fields["solution"])


def gsm8k_verdict(text: str, fields: Fields) -> bool:
    """Compare the answer, or its first number, with the gold answer."""
    answer = parse_answer(text).translate(str.maketrans(_LATEX))
    answer = re.sub(r"(?<=\d)(?:\{,\}|\\[,!;:])(?=\d)", ",", answer)
    for sign, ours in ((r"\*\*", "^"), ("[\u2013\u2014]", "-")):
        answer = re.sub(rf"(?<=\d)\s*{sign}\s*(?=\d)", ours, answer)
    return _begins_with(answer, fields["answer"]) or equal(fields["answer"], answer)


def math_verdict(text: str, fields: Fields) -> bool:
    """Compare the answer with the gold answer."""
    return equal(fields["answer"], parse_answer(text))


def countdown_verdict(text: str, fields: Fields) -> bool:
    """Check the last equation of the answer."""
    lines = [line.lstrip("=") for line in parse_answer(text).split("\n")]
    equations = [line for line in lines if "=" in line]
    return bool(equations) and _solves(equations[-1], fields)


def _begins_with(answer: str, gold: str) -> bool:
    """Return whether the first number of an answer is the gold answer, sign and decimals too."""
    number = _NUMBER.search(answer)
    if number is None or number["no"] or _JOINED.match(answer, number.end()):
        return False
    return not _LIST.fullmatch(answer) and equal(gold, re.sub(r"[\s({]", "", number[0]))


def _solves(equation: str, fields: Fields) -> bool:
    """Return whether the left side of the first `=` uses the numbers and has the target's value.

    A plain expression is evaluated. In other text, math-verify must find the target too, as in
    the published code.
    """
    left, equals, _ = re.sub(r"[ \t]+", " ", equation).partition("=")
    numbers, target = fields["numbers"], fields["target"]
    if not equals or not same_numbers(left, numbers):
        return False
    if len(left) <= MAX_PLAIN and evaluate(left) is not None:
        return has_value(left, target)
    return contains_solution(left, numbers, target=target) and equal_in_text(str(target), left)


REWARDS: dict[str, tuple[Callable[[str, Fields], float], ...]] = {
    "gsm8k": (thinking_format_reward, answer_format_reward, correctness_reward),
    "math": (thinking_format_reward, answer_format_reward, correctness_reward),
    "countdown": (countdown_format_reward, countdown_correctness_reward),
    "sudoku": (sudoku_format_reward, sudoku_correctness_reward),
}
VERDICTS: dict[str, Callable[[str, Fields], bool]] = {
    "gsm8k": gsm8k_verdict,
    "math": math_verdict,
    "countdown": countdown_verdict,
}
