"""Mixtures, custom tasks and reasoning-gym through the same interface."""

import math
import pickle

import pytest

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.grading import Call, Grader

OWN = """
from dataclasses import dataclass

from agrpo_megatron.config.schema import setting
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


def mixture(parts):
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
        {
            "countdown": {"weight": 2},
            "easy": {"name": "sudoku", "options": {"clues": 12}, "eval_problems": 7},
            "own": {"name": str(own), "options": {"highest": 9}, "weight": 0.5},
        }
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
    assert mixture({"countdown": {}, "sudoku": {}}).is_bounded


def test_a_part_reports_its_own_metrics():
    grids = {"name": "sudoku", "options": {"protocol": "d1"}}
    task = mixture({"grids": grids, "countdown": {}})
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
        ({"sudoku": {"clues": 4}}, "task.mixture.sudoku.clues is not a setting of a part; it has"),
        (
            {"sudoku": {"wieght": 4}},
            "task.mixture.sudoku.wieght is not a setting of a part; did you mean weight?",
        ),
        ({"sudoku": {"grader": {}}}, "task.mixture.sudoku.grader is not a setting of a part"),
        ({"sudoku": {"weight": math.inf}}, "task.mixture.sudoku.weight=inf must be a number"),
        ({0: {"name": "sudoku"}}, "task.mixture.0: the label 0 is not text; write it in quotes"),
        (
            {r"a\x": {"name": "countdown", "options": {"low": 20}}},
            r"task.mixture.a\x.options.high=9 is below task.mixture.a\x.options.low=20",
        ),
        ({"s": {"name": "sudoku", "options": {"clue": 4}}}, "task.mixture.s.options.clue is not"),
        (
            {"c": {"name": "countdown", "options": {"low": 20}}},
            "task.mixture.c.options.high=9 is below task.mixture.c.options.low=20",
        ),
    ],
)
def test_errors_name_the_settings_of_the_part(parts, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        mixture(parts)
    assert str(caught.value).startswith(message)


def test_errors_of_loading_name_the_settings_of_the_part():
    task = mixture({"c": {"name": "countdown", "train_problems": 5000}})
    with pytest.raises(ValueError, match=r"^task.mixture.c.train_problems=5000 and task.mixture.c"):
        task.problems("train")


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            TaskSettings(name="mixture", mixture={"sudoku": {}}, options={"clues": 4}),
            "task.options={'clues': 4} is not for task.name=mixture; give each part its own, as "
            "task.mixture.sudoku.options",
        ),
        (
            TaskSettings(name="sudoku", mixture={"countdown": {}}),
            "task.mixture is for task.name=mixture, not for task.name=sudoku; use "
            "task.name=mixture, or task.mixture={}",
        ),
    ],
)
def test_settings_of_another_task_are_refused(settings, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared below
        build_task(settings)
    assert str(caught.value) == message


def countdown_file(path, *problems):
    path.write_text(
        "".join(f'{{"nums": {nums}, "target": {target}}}\n' for nums, target in problems)
    )
    return str(path)


def test_what_one_part_holds_out_is_no_training_problem_of_another(tmp_path):
    first = countdown_file(tmp_path / "a.jsonl", ([1, 2, 3], 6), ([4, 5, 6], 15))
    second = countdown_file(tmp_path / "b.jsonl", ([3, 2, 1], 7))
    third = countdown_file(tmp_path / "c.jsonl", ([7, 8, 9], 24))

    def parts(train, **settings):
        held_out = {"name": "countdown", "options": {"train": third, "eval": second}}
        trained = {"name": "countdown", "options": {"train": train, "eval": third}, **settings}
        return {"held": held_out, "trained": trained, "grids": {"name": "sudoku"}}

    # Of `held`, what it trains on is what the other holds out.
    with pytest.raises(ValueError, match=r"^task held: all training problems .* out by trained;"):
        mixture(parts(first)).problems("train")
    apart = parts(first)
    apart["held"]["options"]["train"] = countdown_file(tmp_path / "d.jsonl", ([2, 2, 2], 8))
    task = mixture(apart)
    train = [p.fields["numbers"] for p in task.problems("train") if p.task == "trained"]
    assert train == [[4, 5, 6]]
    said = "1 of 2 training problems are also held out by held"
    assert f"trained: {said}; left out" in task.notes
    assert [count for count, _ in task.shares] == [1, 1, 50]
    apart["trained"]["leaks"] = "keep"
    task = mixture(apart)
    assert sum(p.task == "trained" for p in task.problems("train")) == 2
    assert f"trained: {said}; KEPT (task.leaks=keep)" in task.notes
    apart["trained"]["leaks"] = "refuse"
    refused = f"^task trained: {said}; use task.mixture.trained.leaks=drop"
    with pytest.raises(ValueError, match=refused):
        mixture(apart).problems("train")


def test_parts_that_make_their_problems_share_numbers_but_no_problem():
    parts = {"a": {"name": "countdown"}, "b": {"name": "countdown", "seed": 1}}
    parts["a"] |= {"train_problems": 900, "eval_problems": 300}
    parts["b"] |= {"train_problems": 900, "eval_problems": 300}
    task = mixture(parts)
    trained, held_out = (
        {problem.key.partition(": ")[2] for problem in task.problems(split)}
        for split in ("train", "eval")
    )
    assert not trained & held_out
    numbers = [{key.partition(" = ")[0] for key in keys} for keys in (trained, held_out)]
    assert numbers[0] & numbers[1]
    assert len(task.notes) == 2


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
        ("exits.py", "import sys\nsys.exit(0)", "raised SystemExit: 0"),
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


@pytest.mark.parametrize(
    "returned, message",
    [
        ("{}['gone']", "its load() raised KeyError: 'gone' at "),
        ("{'train': made}", "its load() at FILE:18 returned the keys ['train']; return {"),
        ("exit(3)", "its load() raised SystemExit: 3"),
        (
            "{'train': made, 'eval': made[1:2]}",
            "its load() has 1 keys in both splits, such as '1'; give each problem one split",
        ),
    ],
)
def test_a_wrong_load_is_refused_with_its_file(own, returned, message):
    own.write_text(OWN.replace('{"train": made[1:], "eval": made[:1]}', returned))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        build_task(TaskSettings(name=str(own))).problems("eval")
    said = message.replace("FILE", str(own))
    assert str(caught.value).startswith(f"task.name={own}: {said}")
    raised = "raised" in message
    assert (caught.value.__cause__ is not None) == raised


def test_a_task_may_hold_out_what_it_trains_on_where_leaks_are_kept(own):
    own.write_text(OWN.replace("made[1:]", "made"))
    task = build_task(TaskSettings(name=str(own), leaks="keep"))
    assert len(task.problems("train")) == 4


def test_a_task_without_a_name_is_called_as_its_file(own):
    own.write_text(OWN.replace('    name = "successor"\n', ""))
    assert build_task(TaskSettings(name=str(own))).name == "own_task"


def test_files_of_one_stem_are_modules_of_their_own(tmp_path):
    """Otherwise objects of one of them could not be sent to the workers."""
    tasks = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "task.py"
        file.write_text(OWN)
        tasks.append(build_task(TaskSettings(name=str(file))))
    for task in tasks:
        assert type(pickle.loads(pickle.dumps(task.options))) is type(task.options)


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


@pytest.mark.parametrize("name, key", [("seed", "task.seed"), ("size", "task.train_problems")])
def test_what_the_task_sets_is_refused_in_the_configuration(name, key):
    with pytest.raises(
        ValueError, match=rf"^task.options.config.{name}=5 has no effect; use {key}$"
    ):
        build_task(gym(config={name: 5}))


@pytest.mark.parametrize("changes", [{"dataset": "chess"}, {"config": {"min_animals": "many"}}])
def test_a_wrong_generator_is_refused(changes):
    with pytest.raises(ValueError, match=r"^task.options.dataset=\w+ cannot be made with"):
        build_task(gym(**changes)).problems("train")
