"""4x4 Sudoku: fill the empty cells so that every row, column and box holds 1 to 4.

With few clues a puzzle has several solutions, and the checker accepts every one of them.
"""

import functools
import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agrpo_megatron.config import setting
from agrpo_megatron.settings import TaskSettings
from agrpo_megatron.tasks.generated import Split, split_problems
from agrpo_megatron.types import Problem, Reward

CELLS = 16
EMPTY = "0"
_ROWS = [range(4 * i, 4 * i + 4) for i in range(4)]
_COLUMNS = [range(i, CELLS, 4) for i in range(4)]
_BOXES = [(i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10)]
UNITS = tuple(tuple(unit) for unit in (*_ROWS, *_COLUMNS, *_BOXES))


@dataclass(frozen=True)
class SudokuOptions:
    """Options of the 4x4 Sudoku task."""

    clues: int = setting(6, "cells that are given", low=1, high=CELLS - 1)
    partial_credit: float = setting(
        0.0,
        "score of a wrong grid per share kept of its constraints: 12 rows, columns and boxes, "
        "and every clue",
        low=0,
        high=1,
    )


class Sudoku:
    """Complete a 4x4 grid written as 16 digits, 0 for empty."""

    name = "sudoku"
    options_type = SudokuOptions

    def __init__(self, settings: TaskSettings, options: SudokuOptions):
        self.options = options
        rng = random.Random(f"sudoku {settings.seed}")
        wanted = settings.train_problems + settings.eval_problems
        self._splits = split_problems(
            _draw_problems(rng, wanted, clues=options.clues),
            settings,
            wider="bring task.options.clues nearer to 8",
        )

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of a split; no puzzle is in both."""
        return self._splits[split]

    def prompt(self, problem: Problem) -> str:
        """Return the puzzle, row by row, and a colon."""
        return f"{problem.fields['puzzle']}:"

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Grade a completed grid against the puzzle, not against `problem.solution`."""
        grid = completion.strip()
        if not re.fullmatch("[1-4]{16}", grid):
            return Reward(0.0, False, {"valid": 0.0, "clues": 0.0})
        clues = [i for i, digit in enumerate(problem.fields["puzzle"]) if digit != EMPTY]
        units = sum(len({grid[i] for i in unit}) == 4 for unit in UNITS)
        kept = sum(grid[i] == problem.fields["puzzle"][i] for i in clues)
        parts = {"valid": units / len(UNITS), "clues": kept / len(clues)}
        correct = units == len(UNITS) and kept == len(clues)
        share = (units + kept) / (len(UNITS) + len(clues))
        return Reward(1.0 if correct else self.options.partial_credit * share, correct, parts)


@functools.cache
def complete_grids() -> tuple[str, ...]:
    """Return all 288 complete grids, in lexical order."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    pairs = ["".join(pair) for pair in itertools.product(rows, repeat=2)]
    halves = [pair for pair in pairs if _holds(pair, _BOXES[:2])]
    grids = ["".join(pair) for pair in itertools.product(halves, repeat=2)]
    return tuple(grid for grid in grids if _holds(grid, _COLUMNS))


def _holds(grid: str, units: Iterable[Sequence[int]]) -> bool:
    return all(len({grid[i] for i in unit}) == 4 for unit in units)


def _draw_problems(rng: random.Random, wanted: int, *, clues: int) -> list[Problem]:
    """Draw `wanted` different puzzles, or all where fewer exist.

    A puzzle's solution is the grid it was cut from: uniform over the puzzle's completions.
    """
    grids = complete_grids()
    chosen: dict[str, Problem] = {}
    for _ in range(4 * wanted):
        problem = _cut_puzzle(rng.choice(grids), rng.sample(range(CELLS), clues))
        chosen.setdefault(problem.key, problem)
        if len(chosen) == wanted:
            return list(chosen.values())
    # Random draws repeat too often: the space is about as small as what is asked for. List it.
    pairs = list(itertools.product(grids, itertools.combinations(range(CELLS), clues)))
    rng.shuffle(pairs)
    for grid, kept in pairs:
        problem = _cut_puzzle(grid, kept)
        chosen.setdefault(problem.key, problem)
        if len(chosen) == wanted:
            break
    return list(chosen.values())


def _cut_puzzle(grid: str, kept: Sequence[int]) -> Problem:
    puzzle = "".join(digit if i in kept else EMPTY for i, digit in enumerate(grid))
    return Problem(puzzle, {"puzzle": puzzle}, grid)
