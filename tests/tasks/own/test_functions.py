"""Functions of the user as rewards: every form that is called, and what is refused."""

import pytest

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.grading import Call, Grader
from tests.tasks.own.test_jsonl import write

ROW = {"prompt": "1+1?", "answer": 2, "level": 3}
FORMS = {  # a function, and its score of the completion "2"
    "completion": ("def f(completion): return len(completion)", 1.0),
    "completion and answer": ("def f(completion, answer): return completion == answer", 1.0),
    "columns in any order": ("def f(level, prompt, completion): return level / 2", 1.5),
    "a default": ("def f(completion, other=0.25): return other", 0.25),
    "all columns": ("def f(completion, **row): return row['level']", 3.0),
    "a Reward": (
        "from agrpo_megatron.types import Reward\n"
        "def f(completion): return Reward(0.5, True, {'a': 0.25})",
        0.5,
    ),
    "TRL": ("def f(completions, **kwargs): return [float(len(c)) for c in completions]", 1.0),
    "TRL with columns": (
        "def f(prompts, completions, answer, **kwargs):\n"
        "    assert prompts == ['1+1?'] and kwargs['level'] == [3]\n"
        "    return [float(c == a) for c, a in zip(completions, answer, strict=True)]",
        1.0,
    ),
    "TRL with keywords only": (
        "def f(*, completions, level): return [n / 2 for n in level]",
        1.5,
    ),
    "TRL with an array": (
        "import numpy\ndef f(completions, **_): return numpy.array([0.5] * len(completions))",
        0.5,
    ),
}
CHAT = """
def f(completions, prompts, **kwargs):
    assert prompts == [[{"role": "user", "content": "1+1?"}]]
    return [float(c[0]["content"] == "2" and c[0]["role"] == "assistant") for c in completions]
"""


def build(folder, code, row=ROW, name="f"):
    path = folder / "mine.py"
    path.write_text(code)
    rows = write(folder / "rows.jsonl", [row])
    options = {"train": "none", "eval": rows, "reward": f"{path}:{name}"}
    return build_task(TaskSettings(name="jsonl", options=options))


@pytest.mark.parametrize("name", FORMS)
def test_functions_are_called_by_the_names_of_their_parameters(tmp_path, name):
    code, score = FORMS[name]
    task = build(tmp_path, code)
    (problem,) = task.problems("eval")
    made = task.reward(problem, "2")
    assert made.score == score and made.parts["f"] == score
    assert made.correct == (score >= 1 or name == "a Reward")
    assert task.code_files == [str(tmp_path / "mine.py")]


def test_completions_of_chats_are_messages_for_trl(tmp_path):
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}
    task = build(tmp_path, CHAT, row=row)
    assert task.reward(task.problems("eval")[0], "2").score == 1.0


WRONG = {
    "no such function": ("def g(completion): return 1", "has no function f; name one as"),
    "other names": ("def f(text, gold): return 1", "takes (text, gold); write def f(completion, a"),
    "positions only": ("def f(completion, /): return 1", "takes (completion); write def f("),
    "async": ("async def f(completion): return 1", "is async; write a plain def"),
    "a column that is not there": (
        "def f(completion, gold): return 1",
        "takes gold, and the first row has no such field, but prompt, answer, level, solution",
    ),
    "an import that fails": ("import nothing_of_the_kind", "raised ModuleNotFoundError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_functions_that_cannot_be_called_are_refused_before_the_run(tmp_path, name):
    code, said = WRONG[name]
    with pytest.raises(ValueError, match=r"^task\.options\.reward\.python=\S+mine\.py:f") as error:
        build(tmp_path, code).problems("eval")
    assert said in str(error.value)


def test_errors_of_a_function_name_its_line(tmp_path):
    task = build(tmp_path, "def f(completion):\n    return {}[completion]")
    grader, (problem,) = Grader(task, task.settings), task.problems("eval")
    (reward,) = grader.grade([Call(problem, "2")])
    grader.close()
    assert reward.failure == "KeyError: '2'"
    assert grader.first_failure.trace.place == f"{tmp_path / 'mine.py'}:2"
