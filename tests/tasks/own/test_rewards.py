"""Rewards by name, with the texts that they accept and refuse."""

import time

import pytest
from hypothesis import given, settings

from agrpo_megatron.tasks.own.rewards import build_parts, final_answer
from tests.tasks.test_hostile import ANY_TEXT, TEXTS

NUMBERS = [  # a text, the gold answer, whether it is right
    ("42", "42", True),
    ("6 * 7 = 42", "42", True),
    ("the answer is 1,234.50", "1234.5", True),
    ("-3", "-3", True),
    ("7-3", "-3", False),
    ("7-3", "3", True),
    ("x = \u22123", "-3", True),
    (".5", "0.5", True),
    ("1, 2, 3", "3", True),
    ("1,2", "2", True),
    ("1,2", "12", False),
    ("$18.", "18", True),
    ("42 or 43", "42", False),
    ("<answer>42</answer> of 43", "42", True),
    (r"\boxed{42} is less than 43", "42", True),
    ("1 + 1 #### 2", "so #### 2", True),
    ("none", "1", False),
    ("", "1", False),
    ("9" * 5000, "9", False),
    ("1", "one", False),
]
MATHS = [
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"<answer>\frac{2}{4}</answer>", r"$\frac{1}{2}$", True),
    ("it is $0.5$", r"\frac{1}{2}", True),
    (r"\boxed{x+1}", "1+x", True),
    (r"\boxed{x-1}", "1+x", False),
    (r"\boxed{1} \boxed{2}", "2", True),
    ("", "2", False),
]
PATTERNS = [  # a pattern, a text, whether it is right for the answer 42
    (r"#### (-?\d+)", "so #### 42", True),
    (r"#### (-?\d+)", "so #### 41", False),
    (r"#### (-?\d+)", "42", False),
    (r"(?s)<a>(.*?)</a>", "<a>\n42 </a>", True),
    (r"a|(b)", "a", False),
    (r"^<a>", "<a>41", True),
    (r"^<a>", "41", False),
]


def score(reward, text, answer):
    (part,) = build_parts(reward)
    return bool(part.score(text, {"answer": answer}))


@pytest.mark.parametrize("text, gold, is_right", NUMBERS)
def test_numbers(text, gold, is_right):
    assert score("number", text, gold) == is_right


@pytest.mark.parametrize("text, gold, is_right", MATHS)
def test_maths(text, gold, is_right):
    assert score("math", text, gold) == is_right


@pytest.mark.parametrize("pattern, text, is_right", PATTERNS)
def test_patterns(pattern, text, is_right):
    assert score({"name": "regex", "pattern": pattern}, text, " 42") == is_right


def test_exact_and_contains():
    assert score("exact", " a b\n", "a b") and not score("exact", "a  b", "a b")
    assert score("contains", "so a b.", "a b") and not score("contains", "A b", "a b")
    named = {"name": "contains", "text": "</a>"}
    assert score(named, "1</a>", "2") and not score(named, "2", "2")


def test_final_answers():
    assert final_answer("1 <answer>2</answer> <answer> 3 </answer> 4") == "3"
    assert final_answer(r"<answer>\boxed{5}</answer> \boxed{6}") == "5"
    assert final_answer(r"\boxed{5") is None and final_answer("5") is None


def test_bounded_rewards_grade_hostile_texts_at_once():
    parts = build_parts(["exact", "number", "contains"])
    assert all(part.is_bounded for part in parts)
    assert not any(
        part.is_bounded for part in build_parts(["math", {"name": "regex", "pattern": "a"}])
    )
    for label, text in TEXTS.items():
        for part in parts:
            started = time.process_time()
            assert not part.score(text, {"answer": "12345678"}), label
            assert time.process_time() - started < 0.5, label


@settings(max_examples=300)
@given(text=ANY_TEXT)
def test_any_text_is_graded(text):
    for part in build_parts(["exact", "number", "contains"]):
        assert part.score(text, {"answer": "18"}) in (True, False)
