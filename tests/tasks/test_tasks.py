"""The interface of every task: repeatable disjoint splits, checked options, grades for any text."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task, describe_tasks

SMALL = {
    "countdown": TaskSettings(name="countdown", train_problems=1000, eval_problems=200),
    "sudoku": TaskSettings(name="sudoku", train_problems=1000, eval_problems=200),
    "drawn": TaskSettings(
        name="countdown",
        train_problems=1000,
        eval_problems=200,
        options={"numbers": 5, "high": 99, "operators": "+-*/", "parentheses": True},
    ),
}
BUILT = {name: build_task(chosen) for name, chosen in SMALL.items()}
HOSTILE = [
    "",
    "\0",
    "\ud800",
    "9" * 100_000,
    "(" * 150 + "1" + ")" * 150,
    "(" * 199,
    "-" * 199 + "1",
    "9**9**9**9**9",
    "1+" * 50_000 + "1",
    " " * 100_000 + "1" + "\n" * 100_000,
    "1(2)(3)",
    "\uff11+\u0663",  # digits, but not ASCII
    "__import__('os').getcwd()",
    "1234" * 25_000,
]


@pytest.mark.parametrize("name", BUILT)
def test_splits_are_repeatable_disjoint_and_of_the_size_asked(name):
    task, chosen = BUILT[name], SMALL[name]
    train, held_out = task.problems("train"), task.problems("eval")
    assert (len(train), len(held_out)) == (1000, 200)
    assert len({p.key for p in (*train, *held_out)}) == 1200
    assert build_task(chosen).problems("train") == train
    assert build_task(replace(chosen, seed=1)).problems("train") != train
    fewer = build_task(replace(chosen, train_problems=10))
    assert fewer.problems("eval") == held_out
    assert fewer.problems("train") == train[:10]


@pytest.mark.parametrize("name", BUILT)
def test_every_solution_is_right(name):
    task = BUILT[name]
    for problem in (*task.problems("train"), *task.problems("eval")):
        for text in (problem.solution, f" {problem.solution}\n"):
            assert task.reward(problem, text).score == 1.0
            assert task.reward(problem, text).correct


@pytest.mark.parametrize("name", BUILT)
@settings(max_examples=100, deadline=1000)
@given(text=st.text() | st.text("0123456789+-*/() \n\0_.e", max_size=250))
def test_any_text_is_graded(name, text):
    task = BUILT[name]
    reward = task.reward(task.problems("train")[0], text)
    assert 0.0 <= reward.score <= 1.0
    assert reward.correct == (reward.score == 1.0)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_wrong_at_once(name, text):
    task = BUILT[name]
    start = time.process_time()
    assert task.reward(task.problems("train")[0], text).score == 0.0
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "sudoku",
            {"clue": 4},
            "task.options.clue is not an option of sudoku; did you mean clues?",
        ),
        (
            "sudoku",
            {"operators": "+"},
            "task.options.operators is not an option of sudoku; it has protocol, train, eval, "
            "eval_rows, clues, unique, partial_credit",
        ),
        ("sudoku", {"clues": 16}, "task.options.clues=16 must be at most 15"),
        (
            "countdown",
            {"numbers": "three"},
            "task.options.numbers='three' has the wrong type; it must be an integer",
        ),
        (
            "countdown",
            {"low": 20},
            "task.options.high=9 is below task.options.low=20; use at least 20",
        ),
        (
            "countdown",
            {"operators": "+x"},
            'task.options.operators=+x must name some of + - * /, each once; use for example "+-*"',
        ),
        (
            "countdown",
            {"partial_credit": 1},
            "task.options.partial_credit=1.0 must be below the 1 of a right answer; "
            "use for example 0.1",
        ),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared below
        build_task(TaskSettings(name=name, options=options))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "countdown",
            {},
            "task.train_problems=20000 and task.eval_problems=256 ask for 20256 different "
            "problems, but countdown yields 1386 with these options; use at most 1130 training "
            "problems or raise task.options.high",
        ),
        (
            "sudoku",
            {"clues": 15},  # one empty cell: 16 * 288 puzzles, all different
            "task.train_problems=20000 and task.eval_problems=256 ask for 20256 different "
            "problems, but sudoku yields 4608 with these options; use at most 4352 training "
            "problems or bring task.options.clues nearer to 8",
        ),
    ],
)
def test_more_problems_than_there_are_is_refused_when_they_are_asked_for(name, options, message):
    task = build_task(TaskSettings(name=name, options=options))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared below
        task.problems("train")
    assert str(caught.value) == message


def test_every_option_is_described():
    described = describe_tasks()
    assert [option.key for option in described["sudoku"]] == [
        "task.options.protocol",
        "task.options.train",
        "task.options.eval",
        "task.options.eval_rows",
        "task.options.clues",
        "task.options.unique",
        "task.options.partial_credit",
    ]
    assert all(option.help for options in described.values() for option in options)
