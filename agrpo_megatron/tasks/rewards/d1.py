"""The rewards and evaluation parsers of d1's published code, by their published names.

The values equal the published ones, oddities included, since published results depend on them.
Two exceptions: no text of a model is executed (no powers, no floor division), and every text
takes bounded time. docs/tasks.md lists the oddities.
Source: github.com/dllm-reasoning/d1, diffu-grpo/reward_func.py and eval/parse_and_get_acc.py.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from agrpo_megatron.tasks.rewards.arithmetic import evaluate, has_value, same_numbers
from agrpo_megatron.tasks.rewards.extract import CELLS, Fields, cells_right, last_tagged, share
from agrpo_megatron.tasks.rewards.latex import is_equivalent, last_boxed

TOLERANCE = 1e-5  # between the value of an expression and its target
_ENDS = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|</answer>")
_DONE = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")


def xmlcount_reward_func(text: str, _fields: Fields) -> float:
    """Return 0.125 per tag on a separate line, minus 0.001 per character after the answer."""
    count = 0.125 * (text.count("<reasoning>\n") == 1)
    count += 0.125 * (text.count("\n</reasoning>\n") == 1)
    if text.count("\n<answer>\n") == 1:
        count += 0.125 - 0.001 * len(text.split("\n</answer>\n")[-1])
    if text.count("\n</answer>") == 1:
        count += 0.125 - 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
    return count


def soft_format_reward_func(text: str, _fields: Fields) -> float:
    """Return 0.5 for reasoning and an answer of one line each, at the start."""
    if not text.startswith("<reasoning>"):
        return 0.0
    first_line = _line_end(text, 0)
    for tags in re.finditer(r"</reasoning>\s*<answer>", text):
        if tags.start() >= first_line:
            break
        end = text.find("</answer>", tags.end())
        if end < 0:
            break
        if end < _line_end(text, tags.end()):
            return 0.5
    return 0.0


def strict_format_reward_func(text: str, _fields: Fields) -> float:
    """Return 0.5 for reasoning and an answer of one line each, and nothing else but line ends."""
    pattern = r"<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\n\n?"
    return 0.5 * (re.fullmatch(pattern, text) is not None)


def int_reward_func(text: str, _fields: Fields) -> float:
    """Return 0.5 for an answer of only digits."""
    return 0.5 * _answer(text).isdigit()


def correctness_reward_func(text: str, fields: Fields) -> float:
    """Return 2 if the answer is exactly the gold text."""
    return 2.0 * (_answer(text) == fields["answer"])


def correctness_reward_func_math(text: str, fields: Fields) -> float:
    """Return 2 if the last box, or a text without boxes, is equivalent to the gold answer."""
    boxed = last_boxed(text)
    return 2.0 * is_equivalent(text if boxed is None else boxed, fields["answer"])


def boxed_and_answer_tags_format_reward(text: str, _fields: Fields) -> float:
    """Return 0.75 with an answer tag, 0.25 without: the published pattern never matches a box."""
    parts = text.split("<answer>")
    inner = parts[1].split("</answer>")[0] if len(parts) > 1 else text
    return 0.5 * ((len(parts) > 1) + (1.0 if "\boxed" in inner else 0.5))


def countdown_reward_func(text: str, fields: Fields) -> float:
    """Return 1 for an expression that solves the problem, 0.1 for any other answer."""
    answer = last_tagged(text)
    if answer is None:
        return 0.0
    return 1.0 if _solves(answer, fields) else 0.1


def sudoku_reward_func(text: str, fields: Fields) -> float:
    """Return the share of empty cells that are right; 0 for a puzzle without empty cells."""
    answer = last_tagged(text) or ""
    grid = "".join(c for c in answer if c.isdigit())
    if not grid:
        return 0.0
    grid = grid.ljust(CELLS, "0")[:CELLS]
    return share(*cells_right(grid, fields["puzzle"], fields["solution"]))


def parse_gsm8k(text: str, fields: Fields) -> dict[str, Any]:
    """Read the first usable box, else the last number of the first answer block."""
    found = next((v for box in _boxes(text) if (v := _box_number(box)) is not None), None)
    answer = _first_answer(text) if found is None else None
    if answer:
        found = _number(answer, place=-1)
    correct = found is not None and found == _gold_number(fields["answer"])
    return {"extracted_answer": found, "is_correct": correct}


def parse_math(text: str, fields: Fields) -> dict[str, Any]:
    """Read the last box, else the text without boxes; if empty, the first answer block."""
    found = last_boxed(text) or None
    if found is None:
        found = _first_answer(text)
    correct = found is not None and is_equivalent(found, fields["answer"])
    return {"extracted_answer": found, "is_correct": correct}


def parse_countdown(text: str, fields: Fields) -> dict[str, Any]:
    """Read the last box, else the text without boxes; the answer block if a box is not closed."""
    found = last_boxed(text)
    if found is None:
        answer = _first_answer(text)
        found = text if answer is None else answer
    for sign, operator in ((r"\div", "/"), (r"\times", "*"), (r"\cdot", "*")):
        found = found.replace(sign, operator)
    found = _left_side(found)
    result = None
    if same_numbers(found, fields["numbers"]):
        value = evaluate(found)
        result = math.inf if value is None else value
    correct = _solves(found, fields)
    return {"extracted_answer": found, "evaluation_result": result, "is_correct": correct}


def parse_sudoku(text: str, fields: Fields) -> dict[str, Any]:
    """Try five places for a grid; return counts of cells, for the average over all cells."""
    found = next((grid.strip() for grid in _grids(text) if grid and grid.strip()), "")
    found = re.sub(r"\s", "", found)
    if found:
        found = found.ljust(CELLS, "0")[:CELLS]
    right, empty = cells_right(found or " " * CELLS, fields["puzzle"], fields["solution"])
    cells = {"empty_cells": empty, "correct_cells": right}
    return {"extracted_answer": found, **cells, "accuracy": share(right, empty)}


REWARDS: dict[str, tuple[Callable[[str, Fields], float], ...]] = {
    "gsm8k": (
        xmlcount_reward_func,
        soft_format_reward_func,
        strict_format_reward_func,
        int_reward_func,
        correctness_reward_func,
    ),
    "math": (correctness_reward_func_math, boxed_and_answer_tags_format_reward),
    "countdown": (countdown_reward_func,),
    "sudoku": (sudoku_reward_func,),
}
PARSERS: dict[str, Callable[[str, Fields], dict[str, Any]]] = {
    "gsm8k": parse_gsm8k,
    "math": parse_math,
    "countdown": parse_countdown,
    "sudoku": parse_sudoku,
}


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _answer(text: str) -> str:
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def _first_answer(text: str) -> str | None:
    start = text.find("<answer>")
    end = text.find("</answer>", start) if start >= 0 else -1
    return text[start + len("<answer>") : end].strip() if end >= 0 else None


def _boxes(text: str) -> Iterator[str]:
    r"""Yield the text between `\boxed{` and the next `}` of the same line."""
    place = text.find("\\boxed{")
    while place >= 0:
        start = place + len("\\boxed{")
        end = text.find("}", start)
        if end < 0:
            return
        if end < _line_end(text, start):
            yield text[start:end].strip()
            start = end + 1
        place = text.find("\\boxed{", start)


def _box_number(box: str) -> float | None:
    return None if re.fullmatch(r"\.*", box) else _number(box, place=0)


def _number(text: str, *, place: int) -> float | None:
    """Read a text as a number, else the number at index `place` in it."""
    try:
        return float(text)
    except ValueError:
        numbers = re.findall(r"-?\d+\.?\d*", text)
        return float(numbers[place]) if numbers else None


def _gold_number(answer: str) -> float | None:
    try:
        return float(answer.replace(",", ""))
    except ValueError:
        return None


def _solves(expression: str, fields: Fields) -> bool:
    is_legal = same_numbers(expression, fields["numbers"])
    return is_legal and has_value(expression, fields["target"], tolerance=TOLERANCE)


def _left_side(text: str) -> str:
    """Return the first expression before an `=` and a number, else the whole text."""
    for match in re.finditer(r"=[0-9. ]", text):
        start = match.start()
        while start > 0 and text[start - 1] in "0123456789+-*/() ":
            start -= 1
        if start < match.start():
            return text[start : match.start()].strip()
    return text


def _grids(text: str) -> Iterator[str | None]:
    """Yield the text at each possible place of a grid, most reliable first."""
    opening, closing = text.find("<answer>"), text.find("</answer>")
    fenced = re.compile(r"```([\d\s]+)```").search(text, opening) if opening >= 0 else None
    yield fenced[1] if fenced else None
    end = _ENDS.search(text, opening) if opening >= 0 else None
    yield text[opening + len("<answer>") : end.start()] if end else None
    if closing >= 0:
        after = closing + len("</answer>")
        done = _DONE.search(text, after)
        yield text[after : done.start() if done else len(text)]
    before = (text[: tag.start()].rstrip()[-CELLS:] for tag in re.finditer("</answer>", text))
    yield next((grid for grid in before if len(grid) == CELLS and grid.isdecimal()), None)
    alone = re.search(r"\b\d{16}\b", text)
    yield alone[0] if alone else None
