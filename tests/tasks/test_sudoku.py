"""Sudoku against a list of grids from brute force."""

import itertools

import pytest

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.types import Problem, Reward


def _list_grids():
    found = []
    for rows in itertools.product(itertools.permutations("1234"), repeat=4):
        columns = all(len(set(column)) == 4 for column in zip(*rows, strict=True))
        boxes = (rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2))
        if columns and all(len(set(box)) == 4 for box in boxes):
            found.append("".join(map("".join, rows)))
    return found


GRIDS = _list_grids()


def completions(puzzle):
    return [
        grid
        for grid in GRIDS
        if all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))
    ]


def test_every_completion_and_no_other_grid_is_right():
    assert len(GRIDS) == 288
    options = {"unique": False}
    task = build_task(
        TaskSettings(name="sudoku", train_problems=1, eval_problems=100, options=options)
    )
    several = 0
    for problem in task.problems("eval"):
        puzzle = problem.fields["puzzle"]
        assert len(puzzle) - puzzle.count("0") == 6
        assert task.prompt(problem) == f"{puzzle}:"
        right = completions(puzzle)
        several += len(right) > 1
        assert [grid for grid in GRIDS if task.reward(problem, grid).correct] == right
    assert several > 50


@pytest.mark.parametrize("clues", [5, 8, 12])
def test_unique_puzzles_have_one_completion(clues):
    options = {"clues": clues}
    task = build_task(
        TaskSettings(name="sudoku", train_problems=200, eval_problems=100, options=options)
    )
    for problem in (*task.problems("train"), *task.problems("eval")):
        puzzle = problem.fields["puzzle"]
        assert completions(puzzle) == [problem.fields["solution"]]
        assert sum(digit != "0" for digit in puzzle) == clues


def test_every_single_character_change_is_wrong_unless_it_is_a_completion():
    task = build_task(TaskSettings(name="sudoku", train_problems=1, eval_problems=50))
    for problem in task.problems("eval"):
        right, text = set(completions(problem.key)), problem.solution
        for i, character in itertools.product(range(17), ("", *"0123456789. \n")):
            for changed in (text[:i] + character + text[i + 1 :], text[:i] + character + text[i:]):
                assert task.reward(problem, changed).correct == (changed.strip() in right)


def test_solution_is_uniform_over_completions():
    # The solution's place among n completions has mean (n - 1) / 2 and variance (n^2 - 1) / 12.
    options = {"clues": 4, "unique": False}
    task = build_task(
        TaskSettings(name="sudoku", train_problems=1000, eval_problems=1, options=options)
    )
    total = variance = 0.0
    for problem in task.problems("train"):
        right = completions(problem.key)
        total += right.index(problem.solution) - (len(right) - 1) / 2
        variance += (len(right) ** 2 - 1) / 12
    assert abs(total) < 4 * variance**0.5


@pytest.mark.parametrize(
    "grid, score, parts",
    [
        ("1234341221434321", 1.0, {"valid": 1.0, "clues": 1.0}),
        # Two digits of the last row changed places: one clue and two columns are lost.
        ("1234341221433421", 0.5 * (10 + 1) / 14, {"valid": 10 / 12, "clues": 0.5}),
        # A right grid of another puzzle: no clue kept.
        ("4321123434122143", 0.5 * 12 / 14, {"valid": 1.0, "clues": 0.0}),
        ("123434122143432", 0.0, {"valid": 0.0, "clues": 0.0}),
    ],
)
def test_partial_credit_is_the_share_of_constraints_kept(grid, score, parts):
    options = {"partial_credit": 0.5}
    task = build_task(
        TaskSettings(name="sudoku", train_problems=1, eval_problems=1, options=options)
    )
    problem = Problem("", {"puzzle": "1000000000004000"}, "")
    reward = task.reward(problem, grid)
    assert (reward.score, reward.parts) == (score, parts)


def test_a_verdict_that_failed_has_no_cell_right():
    """Its cells count for any value of `task.grader.failed_score`."""
    task = build_task(TaskSettings(name="sudoku", options={"protocol": "d1"}))
    solution = "1234341221434321"
    problems = [
        Problem(puzzle, {"puzzle": puzzle, "solution": solution}, "")
        for puzzle in ("1234341221434320", "1234341221430000")
    ]
    right = task.verdict(problems[0], "", f"<answer>{solution}</answer>")
    failed = Reward(-1.0, False, failure="timeout")
    assert task.summary(problems, [right, failed]) == {"cells/macro": 0.5, "cells/micro": 0.2}
