"""4x4 Sudoku: fill the empty cells so that every row, column and box holds 1 to 4.

With few clues a puzzle has several solutions; the plain reward accepts each of them.
"""

import functools
import itertools
import operator
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from agrpo_megatron.config.schema import setting
from agrpo_megatron.tasks.base import Splits, distinct
from agrpo_megatron.tasks.benchmarks import PROTOCOLS, cell_averages, prompt_text
from agrpo_megatron.tasks.public import GeneratedTask, PublicOptions
from agrpo_megatron.tasks.rewards.extract import CELLS, share
from agrpo_megatron.types import Problem, Reward

EMPTY = "0"
_ROWS = [range(4 * i, 4 * i + 4) for i in range(4)]
_COLUMNS = [range(i, CELLS, 4) for i in range(4)]
_BOXES = [(i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10)]
UNITS = (*_ROWS, *_COLUMNS, *_BOXES)


@dataclass(frozen=True)
class SudokuOptions(PublicOptions):
    """Options of the 4x4 Sudoku task."""

    protocol: str = setting(
        "plain", "short prompts for small models, or as published", choices=("plain", *PROTOCOLS)
    )
    clues: int = setting(6, "given cells", low=1, high=CELLS - 1)
    unique: bool = setting(True, "make puzzles with exactly one solution")
    partial_credit: float = setting(
        0.0,
        "plain: score of a wrong grid per share kept of its constraints: 12 rows, columns and "
        "boxes, and every clue",
        low=0,
        high=1,
    )


class Sudoku(GeneratedTask):
    """Complete a 4x4 grid written as 16 digits, 0 for empty."""

    name = "sudoku"
    options_type = SudokuOptions
    options: SudokuOptions
    generation_fix = "bring task.options.clues nearer to 8"

    def load(self) -> Splits:
        """Return the problems of both splits; note puzzles that the prompt itself solves."""
        splits = super().load()
        if self.options.protocol == "agrpo":
            examples = re.findall(r"Puzzle: ([0-4]{16})", prompt_text("agrpo_sudoku"))
            solved = sum(problem.key in examples for problem in splits["eval"])
            if solved:
                self.notes.append(
                    f"sudoku: the prompt of protocol agrpo solves {solved} held-out puzzles: "
                    "do not report its accuracy on this file"
                )
        return splits

    def make(self, rng: random.Random, count: int) -> list[Problem]:
        """Draw up to `count` different puzzles.

        The solution is the grid a puzzle was cut from: uniform over the puzzle's completions.
        """
        puzzles = _cut_puzzles(rng, self.options.clues, draws=8 * count)
        if self.options.unique:
            puzzles = (puzzle for puzzle in puzzles if count_solutions(puzzle.key) == 1)
        return distinct(puzzles, count)

    def summary(self, problems: Sequence[Problem], verdicts: Sequence[Reward]) -> dict[str, float]:
        """Return the two published averages of right cells; empty for protocol plain."""
        return {} if self.is_plain else cell_averages(problems, verdicts)

    def plain_prompt(self, problem: Problem) -> str:
        """Return the puzzle, row by row, and a colon."""
        return f"{problem.fields['puzzle']}:"

    def plain_reward(self, problem: Problem, completion: str) -> Reward:
        """Grade a completed grid against the puzzle, not against `problem.solution`."""
        grid, puzzle = completion.strip(), problem.fields["puzzle"]
        if not re.fullmatch("[1-4]{16}", grid):
            return Reward(0.0, False, {"valid": 0.0, "clues": 0.0})
        clues = [i for i, digit in enumerate(puzzle) if digit != EMPTY]
        units = sum(len({grid[i] for i in unit}) == 4 for unit in UNITS)
        kept = sum(grid[i] == puzzle[i] for i in clues)
        parts = {"valid": units / len(UNITS), "clues": share(kept, len(clues))}
        correct = units == len(UNITS) and kept == len(clues)
        held = (units + kept) / (len(UNITS) + len(clues))
        return Reward(1.0 if correct else self.options.partial_credit * held, correct, parts)


@functools.cache
def complete_grids() -> tuple[str, ...]:
    """Return all 288 complete grids, in lexical order."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    pairs = ["".join(pair) for pair in itertools.product(rows, repeat=2)]
    halves = [pair for pair in pairs if _is_valid(pair, _BOXES[:2])]
    grids = ["".join(pair) for pair in itertools.product(halves, repeat=2)]
    return tuple(grid for grid in grids if _is_valid(grid, _COLUMNS))


def _is_valid(grid: str, units: Iterable[Sequence[int]]) -> bool:
    return all(len({grid[i] for i in unit}) == 4 for unit in units)


@functools.cache
def _grids_with(cell: int, digit: str) -> int:
    """Return the complete grids with a digit in a cell, as a bit mask over the grids."""
    return sum(1 << i for i, grid in enumerate(complete_grids()) if grid[cell] == digit)


def count_solutions(puzzle: str) -> int:
    """Return how many complete grids agree with the clues of a puzzle, at least one."""
    masks = (_grids_with(cell, digit) for cell, digit in enumerate(puzzle) if digit != EMPTY)
    return functools.reduce(operator.and_, masks).bit_count()


def _cut_puzzles(rng: random.Random, clues: int, *, draws: int) -> Iterator[Problem]:
    """Yield puzzles cut from complete grids: first `draws` random ones, then all."""
    grids = complete_grids()
    for _ in range(draws):
        yield _cut_puzzle(rng.choice(grids), rng.sample(range(CELLS), clues))
    # Random draws repeat too often: the space is about as small as the request. Enumerate it.
    pairs = list(itertools.product(grids, itertools.combinations(range(CELLS), clues)))
    rng.shuffle(pairs)
    yield from itertools.starmap(_cut_puzzle, pairs)


def _cut_puzzle(grid: str, kept: Sequence[int]) -> Problem:
    puzzle = "".join(digit if i in kept else EMPTY for i, digit in enumerate(grid))
    return Problem(puzzle, {"puzzle": puzzle, "solution": grid}, grid)
