"""Training problems selected by pass rate or solution, from one task or a mixture."""

import json
from dataclasses import replace

import pytest

from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import SftSettings, TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.tasks.curriculum import filter_by_pass_rate, solved_problems
from agrpo_megatron.types import Problem

COUNTDOWN = {"name": "countdown", "train_problems": 8, "eval_problems": 4}
MIXTURE = {
    "name": "mixture",
    "train_problems": 5,
    "eval_problems": 2,
    "mixture": {"few": {"name": "countdown", "options": {"numbers": 2}}, "sudoku": {"weight": 2}},
}


def _settings(tree, path=None, **more):
    return build(TaskSettings, {**tree, **({"pass_rates": str(path)} if path else {}), **more}, "")


def _write(path, rates):
    """Write a line per completion: `rates` has right and wrong ones by task and key."""
    lines = [
        {"task": task, "key": key, "sample": sample, "correct": mark == "+"}
        for (task, key), marks in rates.items()
        for sample, mark in enumerate(marks)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_problems_within_the_rates_are_kept_and_the_others_counted(tmp_path):
    task = build_task(_settings(COUNTDOWN))
    train, held_out = task.problems("train"), list(task.problems("eval"))
    marks = ["----", "+---", "++--", "+++-", "++++", "-+--", "++++"]  # the last is not rated
    rates = {("countdown", p.key): m for p, m in zip(train, marks, strict=False)}
    path = _write(tmp_path / "completions.jsonl", rates)
    chosen = _settings(COUNTDOWN, path, pass_rate_low=0.25, pass_rate_high=0.75)
    filter_by_pass_rate(task, chosen)
    assert task.problems("train") == [train[i] for i in (1, 2, 3, 5, 7)]
    assert list(task.problems("eval")) == held_out
    assert task.notes[-1] == (
        "task.pass_rate_low=0.25 to task.pass_rate_high=0.75: 3 of 8 training problems left out, "
        "1 passed less often and 2 more often; 1 without a pass rate are kept"
    )


def test_without_a_file_nothing_is_left_out():
    task = build_task(_settings(COUNTDOWN))
    before = list(task.problems("train"))
    filter_by_pass_rate(task, _settings(COUNTDOWN))
    assert list(task.problems("train")) == before and not task.notes


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_mixture_takes_rates_measured_in_it_or_with_its_tasks_alone(tmp_path, is_alone):
    task = build_task(_settings(MIXTURE))
    few = [p for p in task.problems("train") if p.task == "few"]
    name = "countdown" if is_alone else "few"
    keys = [p.key.removeprefix("few: ") if is_alone else p.key for p in few]
    path = _write(
        tmp_path / "rates.jsonl", {(name, key): "-+"[i % 2] for i, key in enumerate(keys)}
    )
    filter_by_pass_rate(task, _settings(MIXTURE, path, pass_rate_low=0.5))
    assert [count for count, _ in task.shares] == [2, 5]
    assert [p for p in task.problems("train") if p.task == "few"] == few[1::2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"cannot be read \(FileNotFoundError"),
        ("not json\n", r"cannot be read \(JSONDecodeError"),
        (
            '{"task": "countdown", "correct": true}\n',
            r"cannot be read \(KeyError: 'key'\) in line 1",
        ),
        ('\n{"task": "a", "key": "b", "correct": "false"}', r"\(KeyError: 'false'\) in line 2"),
        ('{"task": "sudoku", "key": "1", "correct": true}\n', "rates no training problem of task"),
    ],
)
def test_a_file_that_is_none_is_refused_with_what_to_give(tmp_path, content, said):
    path = tmp_path / "rates.jsonl"
    if content is not None:
        path.write_text(content)
    task = build_task(_settings(COUNTDOWN))
    with pytest.raises(ValueError, match=rf"^task\.pass_rates=.*{said}.*evaluation\.split=train"):
        filter_by_pass_rate(task, _settings(COUNTDOWN, path))


def test_rates_that_leave_nothing_are_refused(tmp_path):
    task = build_task(_settings(COUNTDOWN))
    rates = {("countdown", p.key): "-+"[i % 2] for i, p in enumerate(task.problems("train"))}
    path = _write(tmp_path / "rates.jsonl", rates)
    chosen = _settings(COUNTDOWN, path, pass_rate_low=0.3, pass_rate_high=0.7)
    with pytest.raises(ValueError, match="of 8, 4 have a lower pass rate and 4 a higher one"):
        filter_by_pass_rate(task, chosen)


def test_rates_that_leave_nothing_of_a_part_are_refused(tmp_path):
    """The mixture would silently continue without it."""
    task = build_task(_settings(MIXTURE))
    rates = {(p.task, p.key): "+-" if p.task == "few" else "--" for p in task.problems("train")}
    chosen = _settings(MIXTURE, _write(tmp_path / "rates.jsonl", rates), pass_rate_low=0.3)
    said = r"leaves no training problem of task\.mixture\.sudoku: of 5, 5 have a lower"
    with pytest.raises(ValueError, match=said):
        filter_by_pass_rate(task, chosen)


class _Some(Task):
    """Every third problem has a solution, or none has."""

    name = "some"

    def load(self):
        known = self.settings.seed == 0
        train = [Problem(f"{i}", {}, "1" if known and i % 3 == 0 else "") for i in range(7)]
        return {"train": train, "eval": []}


def test_supervision_leaves_out_problems_without_a_solution():
    task = _Some(_settings({"name": "some"}), None)
    solved, shares = solved_problems(task, SftSettings())
    assert [problem.key for problem in solved] == ["0", "3", "6"] and shares == [(3, 1.0)]
    assert [p.key for p in solved_problems(task, SftSettings(problems=4))[0]] == ["0", "3"]


def test_supervision_without_any_solution_is_refused():
    task = _Some(_settings({"name": "some", "seed": 1}), None)
    said = "^sft.iterations=5 needs solutions, but none of the 7 training problems of task some has"
    with pytest.raises(ValueError, match=said):
        solved_problems(task, SftSettings(iterations=5))


@pytest.mark.parametrize(("shown", "count"), [(None, 10), (3, 6)])
def test_the_refusal_says_what_was_looked_at_and_of_which_task(shown, count):
    task = build_task(_settings(MIXTURE))
    train = [replace(problem, solution="") for problem in task.problems("train")]
    task._splits = {"train": train, "eval": []}
    said = " that sft.problems=3 selects" if shown else ""
    said = f"none of the {count} training problems of task mixture{said} has one; use sft"
    with pytest.raises(ValueError, match=said):
        solved_problems(task, SftSettings(iterations=5, problems=shown))


def test_supervision_takes_the_first_problems_of_each_task():
    task = build_task(_settings(MIXTURE))
    solved, shares = solved_problems(task, SftSettings(problems=3))
    assert shares == [(3, 1.0), (3, 2.0)]
    assert [p.task for p in solved] == ["few"] * 3 + ["sudoku"] * 3
    everything, shares = solved_problems(task, SftSettings())
    assert everything == list(task.problems("train")) and [n for n, _ in shares] == [5, 5]
