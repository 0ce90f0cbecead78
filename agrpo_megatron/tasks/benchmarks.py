"""Prompts and grading of GSM8K, MATH, Countdown and Sudoku by AGRPO and d1.

A protocol defines how a benchmark is run: messages, prefill, training rewards and the parser of
evaluation. docs/tasks.md has the source of each fact.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agrpo_megatron.tasks import countdown_problems, data
from agrpo_megatron.tasks.data import Row, first_column, optional_column, text_column, to_whole
from agrpo_megatron.tasks.rewards import agrpo, d1
from agrpo_megatron.tasks.rewards.extract import CELLS, Fields, share
from agrpo_megatron.tasks.rewards.latex import last_boxed
from agrpo_megatron.types import Chat, Message, Problem, Reward

PROTOCOLS = ("agrpo", "d1")
PROMPTS = Path(__file__).parent / "prompts"
CALCULATION = re.compile(r"<<[^>]*>>")  # GSM8K's calculator annotations


def build_prompt(task: str, protocol: str, stage: str, problem: Fields) -> Chat:
    """Return a protocol's prompt of a stage, train or eval, for the fields of a problem."""
    texts = {**problem, "numbers": str(problem.get("numbers"))}
    if protocol == "agrpo":
        system = prompt_text("agrpo_math" if task in ("gsm8k", "math") else f"agrpo_{task}")
        return Chat((Message("system", system), Message("user", _fill(AGRPO_USER[task], texts))))
    name = "d1_sudoku" if task == "sudoku" else f"d1_{task}_{stage}"
    prefill = "<reasoning>" if stage == "eval" else ""
    return Chat((Message("user", _fill(prompt_text(name), texts)),), prefill)


AGRPO_USER = {
    "gsm8k": "{question}",
    "math": "{question}",
    "countdown": "Target: {target}\nNumbers: {numbers}",
    "sudoku": "Puzzle: {puzzle}",
}


@functools.cache
def prompt_text(name: str) -> str:
    """Return a file of `prompts/`."""
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")


def _fill(text: str, values: Mapping[str, Any]) -> str:
    """Replace names in braces by their values; other braces are LaTeX."""
    return re.sub(r"\{([a-z]+)\}", lambda m: str(values.get(m[1], m[0])), text)


def _read_gsm8k(row: Row) -> Fields:
    question = text_column(row, "question")
    rationale, mark, gold = text_column(row, "answer").partition("####")
    if not mark or not gold.strip():
        raise ValueError("column answer has no gold answer after ####")
    rationale = CALCULATION.sub("", rationale).strip()
    return {"question": question, "answer": gold.strip(), "rationale": rationale}


def _read_math(row: Row) -> Fields:
    """Read the gold answer from its own column, or from the last box of the solution.

    It is None if neither has one.
    """
    question, answer = text_column(row, "problem", "question"), data.answer_column(row, "answer")
    has_solution = optional_column(row, "solution") is not None
    if not data.has_column(row, "answer", "solution"):
        raise KeyError("answer or solution")
    solution = text_column(row, "solution") if has_solution else ""
    if answer is None and "\\boxed" in solution:
        answer = data.answer_column({"answer": last_boxed(solution)}, "answer")
    level = optional_column(row, "level")
    if isinstance(level, str):  # such as `Level 4`; the data set has a `Level ?`, which is none
        digits = re.search(r"\d+", level)
        level = digits[0] if digits else 0
    return {
        "question": question,
        "answer": answer,
        "rationale": solution,
        "level": None if level is None else to_whole(level, "level"),
    }


def _read_countdown(row: Row) -> Fields:
    columns, targets = ("nums", "numbers", "input"), ("target", "output")
    numbers = first_column(row, *columns)
    if isinstance(numbers, str):
        numbers = numbers.replace("[", " ").replace("]", " ").replace(",", " ").split()
    if not isinstance(numbers, list | tuple) or not numbers:
        raise data.wrong_value(numbers, "a list", *columns)
    return {
        "numbers": [to_whole(number, *columns) for number in numbers],
        "target": to_whole(first_column(row, *targets), *targets),
    }


def _read_sudoku(row: Row) -> Fields:
    puzzle, solution = str(first_column(row, "puzzle")), str(first_column(row, "solution"))
    puzzle = puzzle.zfill(CELLS)  # a number has lost its leading zeros
    for column, grid, low in (("puzzle", puzzle, 0), ("solution", solution, 1)):
        form = f"[{low}-4]{{16}}"
        if not re.fullmatch(form, grid):
            raise ValueError(f"column {column} holds {grid!r:.80}, which does not match {form}")
    if any(clue not in ("0", digit) for clue, digit in zip(puzzle, solution, strict=True)):
        raise ValueError(f"column solution holds {solution}, which changes a clue of {puzzle}")
    return {"puzzle": puzzle, "solution": solution}


# From a row of the protocols' data sets to the fields of a problem. Each raises a KeyError for a
# missing column, and a ValueError for a wrong value.
READERS: dict[str, Callable[[Row], Fields]] = {
    "gsm8k": _read_gsm8k,
    "math": _read_math,
    "countdown": _read_countdown,
    "sudoku": _read_sudoku,
}


def grade(task: str, protocol: str, fields: Fields, completion: str) -> Reward:
    """Return the training reward: the sum of the protocol's functions, which are its parts."""
    functions = (agrpo if protocol == "agrpo" else d1).REWARDS[task]
    parts = {function.__name__: function(completion, fields) for function in functions}
    correct = any(part >= RIGHT.get(name, math.inf) for name, part in parts.items())
    return Reward(sum(parts.values()), correct, parts)


RIGHT = {  # parts that grade the answer, and their scores for a right one
    "correctness_reward": 3.0,
    "countdown_correctness_reward": 3.0,
    "sudoku_correctness_reward": 3.0,
    "correctness_reward_func": 2.0,
    "correctness_reward_func_math": 2.0,
    "countdown_reward_func": 1.0,
    "sudoku_reward_func": 1.0,
}


def verdict(task: str, protocol: str, fields: Fields, raw: str) -> Reward:
    """Return the verdict of the protocol's evaluation; Sudoku scores the share of right cells."""
    parsed = d1.PARSERS[task](raw, fields) if protocol == "d1" else {}
    if task != "sudoku":
        correct = parsed["is_correct"] if parsed else agrpo.VERDICTS[task](raw, fields)
        return Reward(float(correct), correct)
    if parsed:
        right, empty = parsed["correct_cells"], parsed["empty_cells"]
    else:
        right, empty = agrpo.sudoku_cells(raw, fields)
    parts: dict[str, float] = {"cells": right, "empty": empty}
    return Reward(share(right, empty), empty > 0 and right == empty, parts)


def cell_averages(problems: Sequence[Problem], verdicts: Sequence[Reward]) -> dict[str, float]:
    """Return the two published averages of Sudoku: over puzzles, and over all empty cells.

    A failed verdict counts as no right cell.
    """
    empty = [problem.fields["puzzle"].count("0") for problem in problems]
    right = [round(verdict.parts.get("cells", 0)) for verdict in verdicts]
    shares = list(map(share, right, empty))
    return {
        "cells/macro": sum(shares) / max(1, len(shares)),
        "cells/micro": share(sum(right), sum(empty)),
    }


def solution_text(task: str, protocol: str, fields: Fields, answer: str) -> str:
    """Return a completion for supervised training: the rationale, if any, and the answer.

    Protocol plain has no layout.
    """
    if protocol == "plain":
        return answer
    tag = "think" if protocol == "agrpo" else "reasoning"
    if task in ("gsm8k", "math") and (task == "math" or protocol == "agrpo"):
        answer = f"\\boxed{{{answer}}}"
    if task == "countdown" and protocol == "agrpo":
        answer = f"{answer} = {fields['target']}"
    rationale = fields.get("rationale") or ""
    return f"<{tag}>\n{rationale}\n</{tag}>\n<answer>\n{answer}\n</answer>\n"


def problem_key(task: str, fields: Fields) -> str:
    """Return the identity of a problem, without differences in white space."""
    if task == "countdown":
        return countdown_problems.problem_key(fields["numbers"], fields["target"])
    return " ".join(str(fields["puzzle" if task == "sudoku" else "question"]).split())
