"""Countdown against independent graders."""

import itertools
import re

import pytest

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.types import Problem

EVERYTHING = {"operators": "+-*/", "parentheses": True}


class Whole:
    """A number with only addition, subtraction, multiplication and exact division."""

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return Whole(self.value + other.value)

    def __sub__(self, other):
        return Whole(self.value - other.value)

    def __mul__(self, other):
        return Whole(self.value * other.value)

    def __truediv__(self, other):
        quotient, remainder = divmod(self.value, other.value)
        if remainder:
            raise ZeroDivisionError
        return Whole(quotient)


def is_right(problem, text, legal):
    """Grade by Python's evaluation over `Whole`, which has no other operation."""
    literals = re.findall(r"\d+", text)
    if set(text) - set(legal) or any(number != str(int(number)) for number in literals):
        return False
    if sorted(map(int, literals)) != sorted(problem.fields["numbers"]):
        return False
    try:
        result = eval(re.sub(r"(\d+)", r"Whole(\1)", text), {"Whole": Whole})
    except (SyntaxError, TypeError, ZeroDivisionError):
        return False
    return result.value == problem.fields["target"]


def reachable(numbers):
    """Return every whole value from repeatedly joining two of the numbers."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        joined = [a + b, a - b, a * b] + ([a // b] if b and a % b == 0 else [])
        for value in joined:
            found |= reachable([*rest, value])
    return found


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_every_single_character_change_is_graded_as_python_does(options):
    chosen = TaskSettings(name="countdown", train_problems=1000, eval_problems=100, options=options)
    task = build_task(chosen)
    legal = "0123456789" + ("+-*/()" if options else "+-*")
    still_right = 0
    for problem in task.problems("eval"):
        text = problem.solution
        changed = set()
        for i in range(len(text) + 1):
            for character in ("", *"0123456789+-*/() _."):
                changed |= {text[:i] + character + text[i + 1 :], text[:i] + character + text[i:]}
        for candidate in changed:
            right = is_right(problem, candidate.strip(), legal)
            assert task.reward(problem, candidate).correct == right, (problem, candidate)
            still_right += right
    assert still_right > 100  # 100 of these are the solutions themselves


def test_problems_are_all_that_can_be_solved():
    solvable = {
        (numbers, target)
        for numbers in itertools.combinations_with_replacement(range(1, 7), 3)
        for target in reachable(list(numbers))
        if target > 0
    }
    options = {"high": 6, **EVERYTHING}
    chosen = TaskSettings(
        name="countdown", train_problems=len(solvable) - 1, eval_problems=1, options=options
    )
    task = build_task(chosen)
    found = {
        (tuple(sorted(p.fields["numbers"])), p.fields["target"])
        for p in (*task.problems("train"), *task.problems("eval"))
    }
    assert found == solvable


def test_prompt_shows_the_numbers_in_random_order():
    task = build_task(TaskSettings(name="countdown", train_problems=1000, eval_problems=100))
    problems = task.problems("train")
    assert all(re.fullmatch(r"\d \d \d = \d+:", task.prompt(p)) for p in problems)
    increasing = sum(p.fields["numbers"] == sorted(p.fields["numbers"]) for p in problems)
    assert 150 < increasing < 350  # 1/6, and more where numbers repeat


@pytest.mark.parametrize(
    "text, score, parts",
    [
        ("3*5+7", 1.0, {"numbers": 1.0, "value": 1.0}),
        ("3+5+7", 0.25, {"numbers": 1.0, "value": 0.0}),
        ("15+7", 0.0, {"numbers": 0.0, "value": 0.0}),
        ("3*5+7=22", 0.0, {"numbers": 0.0, "value": 0.0}),
        ("(3*5)+7", 0.0, {"numbers": 0.0, "value": 0.0}),
        ("3*5 +7", 0.0, {"numbers": 0.0, "value": 0.0}),
    ],
)
def test_partial_credit_is_for_the_right_numbers(text, score, parts):
    options = {"partial_credit": 0.25}
    task = build_task(
        TaskSettings(name="countdown", train_problems=1, eval_problems=1, options=options)
    )
    reward = task.reward(Problem("", {"numbers": [3, 5, 7], "target": 22}, ""), text)
    assert (reward.score, reward.parts) == (score, parts)


def test_division_has_to_come_out_whole():
    options = {"operators": "*/", "parentheses": True}
    task = build_task(
        TaskSettings(name="countdown", train_problems=1, eval_problems=1, options=options)
    )
    problem = Problem("", {"numbers": [3, 6, 4], "target": 8}, "")
    assert task.reward(problem, "6*4/3").correct
    assert not task.reward(problem, "4/3*6").correct


def test_rows_of_another_count_of_numbers_are_left_out_and_counted(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = ['{"nums": [1, 2, 3], "target": 6}', '{"nums": [1, 2, 3, 4], "target": 10}']
    path.write_text("\n".join(rows))

    def build(numbers):
        options = {"train": str(path), "numbers": numbers}
        return build_task(TaskSettings("countdown", eval_problems=1, options=options))

    task = build(3)
    assert [problem.fields["numbers"] for problem in task.problems("train")] == [[1, 2, 3]]
    assert task.notes == [f"task.options.train={path}: 1 problems of another kind left out"]
    with pytest.raises(ValueError, match=r"select none of its problems; set task.options.numbers"):
        build(2).problems("train")


SERIES = {"problems": 3, "numbers": 2, "operators": "+-"}


def test_a_series_is_graded_by_its_problems():
    chosen = TaskSettings(name="countdown", train_problems=300, eval_problems=20, options=SERIES)
    task = build_task(chosen)
    for problem in task.problems("eval"):
        assert re.fullmatch(r"(\d \d=\d\d[,:]){3}", task.prompt(problem))
        first, second, third = texts = problem.solution.split()
        for text, one in zip(texts, problem.fields["series"], strict=True):
            assert is_right(Problem("", one, ""), text, "0123456789+-")
        right = task.reward(problem, problem.solution)
        assert (right.score, right.correct) == (1.0, True)
        short = task.reward(problem, f"{first} {second}")
        assert (short.score, short.correct) == (pytest.approx(2 / 3), False)
        wrong = task.reward(problem, f"{first} 0+0 {third}")
        assert (wrong.score, wrong.correct) == (pytest.approx(2 / 3), False)
        assert wrong.parts == {"numbers": pytest.approx(2 / 3), "value": pytest.approx(2 / 3)}
        long = task.reward(problem, f"{problem.solution} {first}")
        assert (long.score, long.correct) == (1.0, False)
        assert task.reward(problem, "").score == 0


def test_a_series_shows_both_orders_of_a_sum():
    chosen = TaskSettings(name="countdown", train_problems=500, eval_problems=9, options=SERIES)
    texts = {t for p in build_task(chosen).problems("train") for t in p.solution.split()}
    assert {"3+8", "8+3"} <= texts


def test_a_series_is_refused_where_problems_are_not_made():
    with pytest.raises(ValueError, match=r"task\.options\.problems=2 needs generated problems"):
        build_task(TaskSettings(name="countdown", options={"problems": 2, "protocol": "d1"}))
