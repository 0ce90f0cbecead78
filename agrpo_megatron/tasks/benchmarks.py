"""Prompts and grading of GSM8K, MATH, Countdown and Sudoku by AGRPO and d1.

A protocol defines how a benchmark is run: messages, prefill, training rewards and the parser of
evaluation. docs/tasks.md has the source of each fact.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agrpo_megatron.tasks import countdown_problems
from agrpo_megatron.tasks.data import (
    Row,
    first_column,
    optional_column,
    text_column,
    to_whole,
    whole_column,
)
from agrpo_megatron.tasks.rewards import agrpo, d1
from agrpo_megatron.tasks.rewards.extract import CELLS, share
from agrpo_megatron.tasks.rewards.latex import last_boxed
from agrpo_megatron.types import Chat, Message, Problem, Reward

PROTOCOLS = ("agrpo", "d1")
PROMPTS = Path(__file__).parent / "prompts"
CALCULATION = re.compile(r"<<[^>]*>>")  # GSM8K's calculator annotations

type Fields = dict[str, Any]


def build_prompt(task: str, protocol: str, stage: str, problem: Fields) -> Chat:
    """Return a protocol's prompt.

    Args:
        stage: train or eval.
        problem: the fields from `read_problem`.
    """
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


def read_problem(task: str, row: Row) -> Fields:
    """Return the fields of a row of the protocols' data sets.

    Raises:
        KeyError: a column is missing.
        ValueError: a column has a wrong value.
    """
    return READERS[task](row)


def _read_gsm8k(row: Row) -> Fields:
    question = text_column(row, "question")
    rationale, mark, gold = text_column(row, "answer").partition("####")
    if not mark or not gold.strip():
        raise ValueError("column answer has no gold answer after ####")
    rationale = CALCULATION.sub("", rationale).strip()
    return {"question": question, "answer": gold.strip(), "rationale": rationale}


def _read_math(row: Row) -> Fields:
    """Read the gold answer from its own column, or from the last box of the solution."""
    question, answer = text_column(row, "problem", "question"), optional_column(row, "answer")
    has_solution = optional_column(row, "solution") not in (None, "")
    if answer is None and not has_solution:
        raise KeyError("answer or solution")
    solution = text_column(row, "solution") if has_solution else ""
    if answer is None and "\\boxed" in solution:
        answer = last_boxed(solution)
    level = optional_column(row, "level")
    digits = re.search(r"\d+", str(level))
    return {
        "question": question,
        "answer": None if answer is None else str(answer),
        "rationale": solution,
        "level": None if level is None else int(digits[0]) if digits else 0,
    }


def _read_countdown(row: Row) -> Fields:
    columns = ("nums", "numbers", "input")
    numbers = first_column(row, *columns)
    if isinstance(numbers, str):
        numbers = numbers.replace("[", " ").replace("]", " ").replace(",", " ").split()
    if not isinstance(numbers, Sequence) or not numbers:
        raise ValueError(
            f"column {' or '.join(columns)} holds {numbers!r:.80}, which is not a list"
        )
    return {
        "numbers": [to_whole(number, *columns) for number in numbers],
        "target": whole_column(row, "target", "output"),
    }


def _read_sudoku(row: Row) -> Fields:
    puzzle, solution = str(first_column(row, "puzzle")), str(first_column(row, "solution"))
    puzzle = puzzle.zfill(CELLS)  # a number has lost its leading zeros
    for column, grid, form in (
        ("puzzle", puzzle, "[0-4]{16}"),
        ("solution", solution, "[1-4]{16}"),
    ):
        if not re.fullmatch(form, grid):
            raise ValueError(f"column {column} holds {grid!r:.80}, which does not match {form}")
    if any(clue not in ("0", digit) for clue, digit in zip(puzzle, solution, strict=True)):
        raise ValueError(f"column solution holds {solution}, which changes a clue of {puzzle}")
    return {"puzzle": puzzle, "solution": solution}


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
    score = sum(parts.values())
    return Reward(score, parts[CORRECT_PART[protocol, task]] >= BEST_SCORE[protocol, task], parts)


CORRECT_PART = {
    ("agrpo", "gsm8k"): "correctness_reward",
    ("agrpo", "math"): "correctness_reward",
    ("agrpo", "countdown"): "countdown_correctness_reward",
    ("agrpo", "sudoku"): "sudoku_correctness_reward",
    ("d1", "gsm8k"): "correctness_reward_func",
    ("d1", "math"): "correctness_reward_func_math",
    ("d1", "countdown"): "countdown_reward_func",
    ("d1", "sudoku"): "sudoku_reward_func",
}
BEST_SCORE = {key: 3.0 if key[0] == "agrpo" else 2.0 for key in CORRECT_PART}
BEST_SCORE |= {("d1", "countdown"): 1.0, ("d1", "sudoku"): 1.0}


def verdict(task: str, protocol: str, fields: Fields, raw: str) -> Reward:
    """Return the verdict of the protocol's evaluation; Sudoku scores the share of right cells."""
    if task == "sudoku":
        right, empty = _cells(protocol, fields, raw)
        parts: dict[str, float] = {"cells": right, "empty": empty}
        return Reward(share(right, empty), empty > 0 and right == empty, parts)
    if protocol == "agrpo":
        correct = AGRPO_VERDICTS[task](raw, fields)
    else:
        correct = d1.PARSERS[task](raw, fields)["is_correct"]
    return Reward(float(correct), correct)


def _cells(protocol: str, fields: Fields, raw: str) -> tuple[int, int]:
    if protocol == "agrpo":
        return agrpo.sudoku_cells(raw, fields)
    parsed = d1.parse_sudoku(raw, fields)
    return parsed["correct_cells"], parsed["empty_cells"]


AGRPO_VERDICTS: dict[str, Callable[[str, Fields], bool]] = {
    "gsm8k": agrpo.gsm8k_verdict,
    "math": agrpo.math_verdict,
    "countdown": agrpo.countdown_verdict,
}


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
    """Return a completion for supervised training: the rationale, if any, and the answer."""
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


def leak_key(task: str, problem: Problem) -> str:
    """Return the key that a training and a held-out problem must not share."""
    return problem.key.partition(" = ")[0] if task == "countdown" else problem.key
