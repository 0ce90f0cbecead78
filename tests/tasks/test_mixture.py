"""Mixtures, tasks of one's own, and reasoning-gym's, through the same interface."""

import pickle

import pytest

from agrpo_megatron.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.grading import Call, Grader

OWN = """
from dataclasses import dataclass

from agrpo_megatron.config import setting
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.types import Problem, Reward


@dataclass(frozen=True)
class Options:
    highest: int = setting(3, "largest number", low=1)


class Successor(Task):
    name = "successor"
    options_type = Options

    def load(self):
        made = [Problem(str(n), {"n": n}, str(n + 1)) for n in range(self.options.highest + 1)]
        return {"train": made[1:], "eval": made[:1]}

    def prompt(self, problem):
        return f"{problem.fields['n']}+1="

    def reward(self, problem, completion):
        correct = completion == problem.solution
        return Reward(float(correct), correct)
"""


def mixture(**parts):
    return build_task(
        TaskSettings(name="mixture", train_problems=50, eval_problems=5, mixture=parts)
    )


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own_task.py"
    path.write_text(OWN)
    return path


def test_parts_keep_their_own_prompts_rewards_and_counts(own):
    task = mixture(
        countdown={"weight": 2},
        easy={"name": "sudoku", "options": {"clues": 12}, "eval_problems": 7},
        own={"name": str(own), "options": {"highest": 9}, "weight": 0.5},
    )
    assert task.shares == [(50, 2.0), (50, 1.0), (9, 0.5)]
    held_out = task.problems("eval")
    assert [problem.task for problem in held_out] == ["countdown"] * 5 + ["easy"] * 7 + ["own"]
    assert len({problem.key for problem in (*held_out, *task.problems("train"))}) == 122
    for problem in (*held_out, *task.problems("train")):
        assert task.reward(problem, problem.solution).correct
        assert task.verdict(problem, problem.solution, problem.solution).correct
    assert task.prompt(held_out[-1]) == "0+1="
    assert held_out[5].fields["puzzle"].count("0") == 4
    assert not task.is_bounded  # own says nothing of its bounds
    assert mixture(countdown={}, sudoku={}).is_bounded


def test_a_part_reports_its_own_metrics():
    task = mixture(grids={"name": "sudoku", "options": {"protocol": "d1"}}, countdown={})
    problems = task.problems("eval")
    verdicts = [task.verdict(problem, problem.solution, problem.solution) for problem in problems]
    assert task.summary(problems, verdicts) == {"grids/cells/macro": 1.0, "grids/cells/micro": 1.0}


@pytest.mark.parametrize(
    "parts, message",
    [
        ({}, "task.name=mixture needs task.mixture; write for example"),
        ({"sudoku": 3}, "task.mixture.sudoku=3 must be a section"),
        ({"sudoku": {"weight": 0}}, "task.mixture.sudoku.weight=0 must be a number above 0"),
        ({"a": {"name": "mixture"}}, "task.mixture.a.name=mixture: a mixture holds no mixtures"),
        ({"chess": {}}, "task.mixture.chess.name=chess must be one of gsm8k"),
        ({"sudoku": {"clues": 4}}, "task.mixture.sudoku.clues"),
        ({"s": {"name": "sudoku", "options": {"clue": 4}}}, "task.mixture.s.options.clue is not"),
        (
            {"c": {"name": "countdown", "options": {"low": 20}}},
            "task.mixture.c.options.high=9 is below task.mixture.c.options.low=20",
        ),
    ],
)
def test_errors_name_the_settings_of_the_part(parts, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        mixture(**parts)
    assert str(caught.value).startswith(message)


def test_errors_of_loading_name_the_settings_of_the_part():
    task = mixture(c={"name": "countdown", "train_problems": 5000})
    with pytest.raises(ValueError, match=r"^task.mixture.c.train_problems=5000 and task.mixture.c"):
        task.problems("train")


def test_a_task_of_ones_own_is_built_from_its_file(own):
    task = build_task(TaskSettings(name=f"{own}:Successor", options={"highest": 2}))
    assert [p.key for p in task.problems("train")] == ["1", "2"]
    assert pickle.loads(pickle.dumps(task.problems("train"))) == task.problems("train")
    assert build_task(TaskSettings(name=str(own))).problems("eval")[0].solution == "1"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.py", None, "does not exist; give the path of a Python file"),
        ("empty.py", "", "holds no class derived from agrpo_megatron.tasks.base.Task; derive one"),
        ("broken.py", "1 +", "raised SyntaxError"),
        ("raises.py", "raise KeyError('x')", "raised KeyError: 'x'"),
        ("two.py", OWN + "\nclass Other(Successor):\n    pass\n", "name one as"),
        ("own.py:Missing", OWN, "holds Successor derived from"),
    ],
)
def test_a_wrong_task_file_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name.partition(":")[0]).write_text(content)
    with pytest.raises(ValueError, match="task.name=") as caught:
        build_task(TaskSettings(name=str(tmp_path / name)))
    assert message in str(caught.value)


def gym(**changes):
    chosen = {"dataset": "leg_counting", **changes}
    return TaskSettings("reasoning_gym", train_problems=30, eval_problems=5, options=chosen)


def test_problems_of_reasoning_gym_are_distinct_repeatable_and_scored_by_its_rule():
    task = build_task(gym())
    train, held_out = task.problems("train"), task.problems("eval")
    assert (len(train), len({p.key for p in (*train, *held_out)})) == (30, 35)
    assert build_task(gym()).problems("train") == train
    for problem in train:
        assert task.reward(problem, f"<think>?</think>{problem.solution}").correct
        assert task.reward(problem, "<answer>-1</answer>").score < 1
        assert task.reward(problem, "no answer").score == 0
    assert train[0].fields["question"] in task.prompt(train[0]).messages[-1].content


def test_answers_to_reasoning_gym_are_graded_in_workers():
    settings = gym()
    task = build_task(settings)
    assert not task.is_bounded
    grader = Grader(task, settings)
    calls = [Call(p, text) for p in task.problems("eval") for text in (p.solution, "x", "\0" * 9)]
    try:
        assert [reward.correct for reward in grader.grade(calls)] == [True, False, False] * 5
    finally:
        grader.close()


@pytest.mark.parametrize("changes", [{"dataset": "chess"}, {"config": {"min_animals": "many"}}])
def test_a_wrong_generator_is_refused(changes):
    with pytest.raises(ValueError, match=r"^task.options.dataset=\w+ cannot be made with"):
        build_task(gym(**changes)).problems("train")
