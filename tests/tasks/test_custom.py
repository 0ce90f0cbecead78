"""What a task of one's own returns: every form that is taken, and what is refused by name."""

import pytest

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.base import as_prompt, task_prompts
from agrpo_megatron.types import Chat, Message

OWN = """
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.types import Chat, Message, Problem, Reward


def made(first, last):
    return [Problem(str(i), {{"n": i}}, str(i)) for i in range(first, last)]


class Own(Task):
    def load(self):
        return {load}

    def prompt(self, problem):
        return {prompt}

    def reward(self, problem, completion):
        return Reward(0.0, False)
"""
LOAD = '{"train": made(4, 9), "eval": made(0, 4)}'
PROMPT = 'problem.key + "="'
ASKED = Chat((Message("user", "4="),))


def _build(folder, load=LOAD, prompt=PROMPT):
    path = folder / "own.py"
    path.write_text(OWN.format(load=load, prompt=prompt))
    return build_task(TaskSettings(name=str(path)))


TAKEN = {
    "text": (LOAD, PROMPT, "4="),
    "a chat": (LOAD, 'Chat((Message("user", problem.key + "="),))', ASKED),
    "a chat with a prefill": (
        LOAD,
        'Chat((Message("user", problem.key + "="),), "<think>")',
        Chat(ASKED.messages, "<think>"),
    ),
    "messages as others write them": (
        LOAD,
        '[{"role": "user", "content": problem.key + "="}]',
        ASKED,
    ),
    "messages with their keys in another order": (
        LOAD,
        '[{"content": problem.key + "=", "role": "user"}]',
        ASKED,
    ),
    "a system message first": (
        LOAD,
        '[{"role": "system", "content": "Count."}, {"role": "user", "content": problem.key + "="}]',
        Chat((Message("system", "Count."), *ASKED.messages)),
    ),
    "generators": ('{"train": iter(made(4, 9)), "eval": iter(made(0, 4))}', PROMPT, "4="),
    "tuples": ('{"train": tuple(made(4, 9)), "eval": tuple(made(0, 4))}', PROMPT, "4="),
    "what map returns": ('{"train": map(lambda p: p, made(4, 9)), "eval": []}', PROMPT, "4="),
}


@pytest.mark.parametrize("name", TAKEN)
def test_every_usual_form_is_taken(tmp_path, name):
    load, prompt, first = TAKEN[name]
    task = _build(tmp_path, load, prompt)
    for _ in range(2):  # a generator is read once
        assert [problem.key for problem in task.problems("train")] == list("45678")
    assert task_prompts(task, task.problems("train"), split="train")[0] == first


PROMPTS = {
    "none for one problem": (
        'None if problem.key == "7" else "1"',
        "'7': its prompt is None; give",
    ),
    "a number": ("4", "problem '4': its prompt is 4; give text, a Chat, or a list of messages"),
    "bytes": ('b"4="', "is b'4='; give text"),
    "texts as messages": ('["4="]', "is ['4=']; give text"),
    "pairs as messages": ('[("user", "4=")]', "is [('user', '4=')]; give text"),
    "another key": ('[{"role": "user", "text": "4="}]', "'text': '4='}]; give text"),
    "a number as content": ('[{"role": "user", "content": 4}]', "'content': 4}]; give text"),
    "a chat of texts": ('Chat(("4=",))', "is Chat(messages=('4=',), prefill=''); give text"),
    "empty text": ('" "', "problem '4': its prompt is empty; give it valid text"),
    "no message": ("[]", "its prompt is empty"),
    "empty messages": ('[{"role": "user", "content": ""}]', "its prompt is empty"),
    "broken text": (r'"4\ud800"', "its prompt holds a lone surrogate"),
    "an error": ('problem.fields["m"]', "its prompt() raised KeyError: 'm'; fix it there"),
    "an error of a value": ('int("x")', "its prompt() raised ValueError: invalid literal"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_other_prompts_are_refused_with_task_problem_and_fix(tmp_path, name):
    prompt, said = PROMPTS[name]
    task = _build(tmp_path, prompt=prompt)
    with pytest.raises(ValueError, match=r"^task\.name=\S+own\.py, problem '[47]': its p") as error:
        task_prompts(task, task.problems("train"), split="train")
    assert said in str(error.value) and "\n" not in str(error.value)


LOADS = {
    "a number as solution": ('[Problem("4", {}, 4)]', "its load() has Problem(key='4'"),
    "none as solution": ('[Problem("4", {}, None)]', "solution=None"),
    "a number as key": ('[Problem(4, {}, "4")]', "its load() has Problem(key=4"),
    "a list as fields": ('[Problem("4", [4], "4")]', "fields=[4]"),
    "rows": ('[{"question": "4="}]', "its load() has {'question': '4='}; return Problem(key"),
    "text": ('"abc"', "its load() has 'a'; return Problem(key, fields, solution)"),
    "nothing": ("None", "its load() raised TypeError"),
}


@pytest.mark.parametrize("name", LOADS)
def test_other_problems_are_refused_with_what_was_expected(tmp_path, name):
    train, said = LOADS[name]
    task = _build(tmp_path, load=f'{{"train": {train}, "eval": made(0, 4)}}')
    with pytest.raises(ValueError, match=r"^task\.name=\S+own\.py: its load\(\) ") as error:
        task.problems("train")
    assert said in str(error.value)


SHAPES = {
    "a pair": ("(made(4, 9), made(0, 4))", "returned a tuple; return {"),
    "nothing": ("None", "returned a NoneType; return {"),
    "another key": (
        '{"train": made(4, 9), "test": made(0, 4)}',
        "returned the keys ['train', 'test']; return {",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_another_shape_is_refused_with_the_line_and_the_shape(tmp_path, name):
    load, said = SHAPES[name]
    task = _build(tmp_path, load=load)
    line = OWN.splitlines().index("    def load(self):") + 1
    with pytest.raises(ValueError, match=r"^task\.name=\S+own\.py: its load\(\) at ") as error:
        task.problems("train")
    assert f"own.py:{line} {said}" in str(error.value)
    assert str(error.value).endswith('{"train": [Problem(...), ...], "eval": [Problem(...), ...]}')


def test_a_load_that_is_cached_is_read_and_refused_with_its_line(tmp_path):
    path, cached = tmp_path / "own.py", "    @functools.cache\n    def load(self):"
    text = "import functools\n" + OWN.replace("    def load(self):", cached)
    path.write_text(text.format(load=LOAD, prompt=PROMPT))
    task = build_task(TaskSettings(name=str(path)))
    assert [len(task.problems(split)) for split in ("train", "eval")] == [5, 4]
    path.write_text(text.format(load="None", prompt=PROMPT))
    line = text.splitlines().index("    @functools.cache") + 1
    with pytest.raises(ValueError, match=rf"own\.py: its load\(\) at \S+own\.py:{line} returned a"):
        build_task(TaskSettings(name=str(path))).problems("train")


def test_an_error_in_load_names_its_line(tmp_path):
    task = _build(tmp_path, load="Splits")
    line = OWN.splitlines().index("        return {load}") + 1
    said = rf"raised NameError: name 'Splits' is not defined at \S+own\.py:{line}; fix it there"
    with pytest.raises(ValueError, match=said):
        task.problems("train")


def test_errors_of_a_part_of_a_mixture_name_the_part(tmp_path):
    _build(tmp_path, prompt="None")
    mixture = {"mine": {"name": str(tmp_path / "own.py")}}
    task = build_task(TaskSettings(name="mixture", mixture=mixture))
    with pytest.raises(ValueError, match=r"^task\.mixture\.mine, problem 'mine: 4': its prompt is"):
        task_prompts(task, task.problems("train"), split="train")


def test_a_prompt_of_the_command_line_is_named_as_such():
    assert as_prompt("12", of="--prompt") == "12"
    with pytest.raises(ValueError, match=r"^--prompt is empty; give it valid text$"):
        as_prompt("", of="--prompt")
