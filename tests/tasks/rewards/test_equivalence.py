"""Answers compared by value, in children of this process and in a grader's worker."""

import signal

import pytest

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.grading import Call, Grader
from agrpo_megatron.tasks.rewards import equivalence
from agrpo_megatron.tasks.rewards.equivalence import equal, equal_in_text
from agrpo_megatron.types import Problem


@pytest.mark.parametrize(
    "gold, answer, same",
    [
        ("18", "18", True),
        ("18", "18.0", True),
        ("18", "17", False),
        ("2,125", "2125", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        ("x^2+1", "1+x^2", True),
        (r"\text{Evelyn}", "Evelyn", True),
        ("1", "", False),
        ("1", "$", False),
        ("1", "9^{9^{9^9}}", False),  # takes for ever
    ],
)
def test_answers_are_compared_by_meaning(gold, answer, same):
    assert equal(gold, answer) == same


def test_whole_numbers_are_compared_as_math_verify_does():
    numbers = ("0", "7", "-7", "70", "123456789012345", "123456789012346")
    for gold in numbers:
        for answer in numbers:
            assert equal(gold, answer) == equal_in_text(f"${gold}$", f"${answer}$")


def test_a_killed_server_is_started_again():
    assert equal("1/2", "0.5")
    server = equivalence._sandbox()._server
    assert server is not None
    server.kill()
    assert equal("1/2", "0.5")


def test_what_takes_too_long_in_a_worker_costs_its_own_part_alone():
    settings = TaskSettings(name="gsm8k")
    problem = Problem("", {"question": "", "answer": "18"}, "")
    answers = {"18": 4.0, r"\frac{36}{2}": 4.0, "17": 1.0, "9^{9^{9}}": 1.0, "10!!!!": 1.0}
    texts = [f"<think>?</think><answer>\\boxed{{{answer}}}</answer>" for answer in answers]
    grader = Grader(build_task(settings), settings)
    try:
        rewards = grader.grade([Call(problem, text) for text in texts])
    finally:
        grader.close()
    assert [reward.score for reward in rewards] == list(answers.values())
    assert [reward.failure for reward in rewards] == [None] * len(answers)


def test_a_worker_without_memory_left_is_replaced(monkeypatch):
    """Sympy may have been anywhere, as where it takes too long."""

    def compare(gold, text):
        raise MemoryError

    monkeypatch.setattr(equivalence, "load_comparison", lambda: compare)
    monkeypatch.setattr(equivalence.worker, "is_spent", False)
    before = signal.getsignal(signal.SIGPROF)
    try:
        assert not equivalence._compare_in_time("1", "1")
    finally:
        signal.signal(signal.SIGPROF, before)
    assert equivalence.worker.is_spent
