"""Any text is graded: finite scores, no exception, bounded time, nothing executed."""

import math
import time

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.rewards import equivalence
from agrpo_megatron.types import Problem

PROBLEMS = {
    "gsm8k": Problem("", {"question": "", "answer": "18"}, ""),
    "math": Problem("", {"question": "", "answer": r"\frac{1}{2}"}, ""),
    "countdown": Problem("", {"numbers": [30, 100, 93], "target": 23}, ""),
    "sudoku": Problem("", {"puzzle": "1000000000004000", "solution": "1234341221434321"}, ""),
}
CHEAP = [
    *((name, "plain") for name in ("countdown", "sudoku")),
    *((name, "agrpo") for name in ("countdown", "sudoku")),
    *((name, "d1") for name in PROBLEMS),
]
COMPARED = [("gsm8k", "agrpo"), ("math", "agrpo")]  # by math-verify, in a child process
SECONDS = 2.0
HUGE = 100_000
TEXTS = {
    "empty": "",
    "import": "__import__('os').system('kill -9 1')",
    "tower": "9**9**9**9",
    "latex tower": "9^{9^{9^{9}}}",
    "factorials": "99999999!!",
    "parentheses": "(" * HUGE + "1" + ")" * HUGE,
    "braces": "{" * HUGE,
    "roots": r"\sqrt{" * 3000 + "1" + "}" * 3000,
    "some roots": r"\sqrt{" * 150 + "1" + "}" * 150,
    "fractions": r"\frac{1}{" * 200 + "2" + "}" * 200,
    "open fractions": r"\frac{" * 20_000,
    "boxes": r"\boxed{" * (HUGE // 7),
    "empty boxes": r"\boxed{}" * (HUGE // 8),
    "answers": "<answer>" * 20_000,
    "closings": "</answer>" * 20_000,
    "blocks": "<answer></answer>" * 10_000,
    "thoughts": "<think><answer>" * 10_000,
    "fences": "<answer>" + "```1 " * 20_000,
    "equations": "1=" * (HUGE // 2),
    "signs": "-" * HUGE + "1",
    "sum": "1+" * (HUGE // 2) + "1",
    "floats": "1e9999999 .5.5.5 nan inf",
    "digits": "9" * HUGE,
    "readable digits": "9" * 4000,
    "decimals": "0." + "0" * 4000 + "1",
    "blanks": " " * HUGE + "1" + "\n" * HUGE,
    "lines": "\n" * HUGE,
    "nul": "\0" * 1000 + "17\0",
    "surrogates": "\ud800\udfff 17 \udc00",
    "right to left": "\u202e71\u202c \u05d0\u0661\u0667",
    "other digits": "\u0661\u0667 \uff11\uff17 \U0001d7cf \u00b2",
    "combining": "e\u0301\u0301\u0301" * 10_000,
    "prime": r"\int_0^{100} e^{-x^2} \sin(x^3) dx",
    "set": r"\{" + ",".join(map(str, range(1000))) + r"\}",
    "matrix": r"\begin{pmatrix}" + "1&" * 500 + r"1\end{pmatrix}",
}
SHAPES = ("{}", "<answer>{}</answer>", "<answer>\\boxed{{{}}}</answer>", "<answer>{} = 23</answer>")
FRAGMENTS = (
    *("<answer>", "</answer>", "<think>", "</think>", "<reasoning>", "</reasoning>", "\n", " "),
    *("\\boxed{", "\\boxed ", "\\fbox{", "\\frac", "\\sqrt", "\\text{ ", "{", "}", "(", ")", "$"),
    *("30", "100", "93", "23", "18", "1,800", "-", "+", "*", "/", "**", "//", "=", ".", "%", "!"),
    *("```", "1234123412341234", "<|endoftext|>", "<|eot_id|>", "\0", "\ud800", "\u202e", "^"),
    *(
        "\\times",
        "\\cdot",
        "\\div",
        "\\left",
        "\\circ",
        "\\%",
        "_",
        "nan",
        "e5",
        "\u0663",
        "\u00b2",
    ),
)
ANY_TEXT = st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join))


def task_of(name, protocol):
    return build_task(TaskSettings(name=name, options={"protocol": protocol}))


def grade(task, text):
    """Grade for training and for evaluation; return both rewards."""
    problem = PROBLEMS[task.name]
    rewards = task.reward(problem, text), task.verdict(problem, text, text)
    for reward in rewards:
        assert math.isfinite(reward.score)
        assert all(math.isfinite(part) for part in reward.parts.values())
        assert isinstance(reward.correct, bool)
    return rewards


def seconds_of_server():
    """Return the processor time of all comparisons of this process so far."""
    server = equivalence._sandbox()._server
    assert server is not None
    times = psutil.Process(server.pid).cpu_times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name, protocol", CHEAP)
def test_hostile_text_is_graded_at_once_and_is_wrong(name, protocol, shape):
    task = task_of(name, protocol)
    for label, text in TEXTS.items():
        started = time.process_time()
        rewards = grade(task, shape.format(text))
        assert time.process_time() - started < SECONDS / 4, label
        assert not any(reward.correct for reward in rewards), label


def test_tasks_that_say_they_are_bounded_are_among_those_just_tested():
    bounded = {
        (name, protocol)
        for name in PROBLEMS
        for protocol in ("agrpo", "d1", "plain")
        if (protocol != "plain" or name in ("countdown", "sudoku"))
        and task_of(name, protocol).is_bounded
    }
    assert bounded == set(CHEAP)


@pytest.mark.slow
@pytest.mark.parametrize("name, protocol", COMPARED)
def test_hostile_text_is_compared_within_the_limit(name, protocol):
    task = task_of(name, protocol)
    assert equivalence.equal(r"\frac{1}{2}", "0.5")  # starts the server
    for label, text in TEXTS.items():
        shape = "{}" if "answer" in text else "<answer>\\boxed{{{}}}</answer>"
        started = time.process_time() + seconds_of_server()
        if name == "math":
            reward = task.reward(PROBLEMS[name], shape.format(text))
        else:  # compares more than once
            reward = task.verdict(PROBLEMS[name], "", shape.format(text))
        spent = time.process_time() + seconds_of_server() - started
        assert spent < SECONDS, label
        assert math.isfinite(reward.score), label


def test_what_a_text_says_is_not_done(tmp_path):
    made = tmp_path / "made"
    for text in (f"open({str(made)!r}, 'w')", f"__import__('pathlib').Path({str(made)!r}).touch()"):
        for name, protocol in [*CHEAP, *COMPARED]:
            for shape in SHAPES:
                grade(task_of(name, protocol), shape.format(text))
    assert not made.exists()


@pytest.mark.parametrize("name, protocol", CHEAP)
def test_any_text_is_graded(name, protocol):
    task = task_of(name, protocol)
    seen = set()

    @settings(max_examples=1235, suppress_health_check=list(HealthCheck))
    @given(text=ANY_TEXT)
    def check(text):
        seen.add(text)
        grade(task, text)

    check()
    assert len(seen) > 1000


@pytest.mark.parametrize("name, protocol", COMPARED)
def test_any_text_is_compared(name, protocol):
    task = task_of(name, protocol)

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(text=ANY_TEXT)
    def check(text):
        grade(task, f"<answer>{text}</answer>")

    check()
