"""Golds and solutions that no answer can equal are found by grading them."""

import json

import pytest

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.grading import Grader, grade_solutions, wrong_solutions

GOLDS = {
    "d1: a comma is misread": ("gsm8k", "d1", ["2,125", "7"], "1 of 2"),
    "d1: text is no number": ("gsm8k", "d1", ["seven", "7"], "1 of 2"),
    "d1: two marks": ("gsm8k", "d1", ["7 #### 8", "8"], "1 of 2"),
    "d1: a box that is not closed": ("math", "d1", ["{5", "5"], "1 of 2"),
    "d1: all are right": ("math", "d1", [r"\frac{1}{2}", "x+1"], None),
    "plain: a grid that breaks the rules": ("sudoku", "plain", ["1" * 16], "1 of 1"),
    "d1: no empty cell": ("sudoku", "d1", ["1234341221434321"], "1 of 1"),
    "plain: no expression": ("countdown", "plain", [6, 7, 5, 9], "1 of 4"),
    "d1: no expression": ("countdown", "d1", [999, 6], "1 of 2"),
    "d1: zero and a negative target": ("countdown", "d1", [-4, 0, 9], None),
    "agrpo: not closed": ("math", "agrpo", ["{5", "7"], "1 of 2"),
    "agrpo: all are right": ("gsm8k", "agrpo", ["2,125", "7", "-3"], None),
}


def _notes(task, grader, split):
    return wrong_solutions(task, grade_solutions(task, grader, split), split)


@pytest.mark.parametrize("name, protocol, golds, said", GOLDS.values(), ids=GOLDS)
def test_golds_that_no_answer_equals_are_counted(tmp_path, name, protocol, golds, said):
    path = tmp_path / "a.jsonl"
    puzzle = "0" * 16 if protocol == "plain" else golds[0]
    rows = {
        "gsm8k": lambda n, gold: {"question": f"{n}?", "answer": f"#### {gold}"},
        "math": lambda n, gold: {"problem": f"{n}?", "answer": gold},
        "countdown": lambda _, gold: {"nums": [1, 2, 3], "target": gold},
        "sudoku": lambda _, gold: {"puzzle": puzzle, "solution": gold},
    }
    lines = [json.dumps(rows[name](n, gold)) for n, gold in enumerate(golds)]
    path.write_text("\n".join(lines))
    options = {"protocol": protocol, "train": "none", "eval": str(path)}
    task = build_task(TaskSettings(name=name, options=options))
    grader = Grader(task, task.settings)
    notes = _notes(task, grader, "eval")
    grader.close()
    assert len(notes) == (said is not None)
    assert (
        said is None
        or f"eval: the gold answers of {said} problems (of {len(golds)}) are graded" in notes[0]
    )


OWN = """
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.types import Problem, Reward

class Own(Task):
    name = "own"
    is_bounded = True

    def load(self):
        made = [Problem(str(n), {}, "" if n < 50 else str(n)) for n in range(3000)]
        return {"train": made, "eval": [Problem("last", {}, "ninety")]}

    def prompt(self, problem):
        return problem.key

    def reward(self, problem, completion):
        number = int(completion)
        return Reward(1.0, number < 2990)
"""


def test_solutions_of_a_users_task_are_graded_and_capped(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    task = build_task(TaskSettings(name=str(path)))
    grader = Grader(task, task.settings)
    (train,) = _notes(task, grader, "train")
    assert train.startswith("train: the gold answers of 3 of 983 problems (of 3000) are graded as")
    (held_out,) = _notes(task, grader, "eval")
    assert (
        "of 1 of 1 problems (of 1) are graded as wrong, such as of 'last' (ValueError: " in held_out
    )
