"""Solved problems before each one of evaluation: as text, as turns of a chat, and in mixtures."""

import pytest

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.base import Task, task_prompts
from agrpo_megatron.types import Chat, Message, Problem


class Doubling(Task):
    """Doubles numbers; even ones have no known solution."""

    name = "doubling"
    is_chat = False

    def load(self):
        made = [Problem(str(n), {"n": n}, str(2 * n) if n % 2 else "") for n in range(8)]
        return {"train": made[:6], "eval": made[6:]}

    def prompt(self, problem):
        text = f"2*{problem.key}="
        if not self.is_chat:
            return text
        return Chat((Message("system", "Count."), Message("user", text)), prefill="It is ")


def doubling(*, is_chat=False, seed=0):
    task = Doubling(TaskSettings(name="doubling", seed=seed), None)
    task.is_chat = is_chat
    return task


def held_out(task):
    return task_prompts(task, task.problems("eval"), split="eval")


def test_examples_of_a_text_stand_before_it():
    task = doubling()
    task.show_examples(3)
    shown = [f"2*{n}={2 * n}" for n in (1, 3, 5)]
    first, second = held_out(task)
    *examples, last = first.split("\n\n")
    assert sorted(examples) == shown and last == "2*6="
    assert second == first.replace("2*6=", "2*7="), "all problems have the same examples"
    assert task_prompts(task, task.problems("train")[:1], split="train") == ["2*0="]


def test_examples_of_a_chat_are_earlier_turns_after_one_system_message():
    task = doubling(is_chat=True)
    task.show_examples(1)
    prompt = held_out(task)[0]
    system, asked, answer, last = prompt.messages
    number = int(asked.content[2:-1])
    assert number in (1, 3, 5)
    assert system == Message("system", "Count.")
    assert answer == Message("assistant", f"It is {2 * number}")
    assert (last, prompt.prefill) == (Message("user", "2*6="), "It is ")


def test_the_seed_of_the_task_chooses_the_examples():
    chosen = set()
    for seed in (0, 0, 1, 2, 3, 4):
        task = doubling(seed=seed)
        task.show_examples(2)
        chosen.add(tuple(text for text, _ in task.examples))
    assert 1 < len(chosen) <= 5


def test_too_few_solutions_are_refused():
    with pytest.raises(ValueError, match="few_shot=4: task doubling has 3 training problems"):
        doubling().show_examples(4)


def test_each_task_of_a_mixture_shows_its_own():
    parts = {"sums": {"name": "countdown", "options": {"numbers": 2}}, "grids": {"name": "sudoku"}}
    settings = TaskSettings(name="mixture", train_problems=20, eval_problems=2, mixture=parts)
    task = build_task(settings)
    task.show_examples(2)
    problems = task.problems("eval")
    prompts = task_prompts(task, problems, split="eval")
    for problem, prompt in zip(problems, prompts, strict=True):
        *examples, last = prompt.split("\n\n")
        solved = [p for p in task.problems("train") if p.task == problem.task]
        asked = task_prompts(build_task(settings), [*solved, problem], split="eval")
        assert last == asked[-1] and len(examples) == 2
        known = {text + p.solution for text, p in zip(asked, solved, strict=False)}
        assert set(examples) <= known, "each example is a training problem of the task, solved"
