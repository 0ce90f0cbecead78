"""Rewards, parsers and prompts against values of the published programs."""

import gzip
import json
from pathlib import Path

import pytest

from agrpo_megatron.tasks.rewards import agrpo
from tools import check_rewards

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tasks"


def check(name):
    tally = check_rewards.check_file(FIXTURES / name)
    assert tally.wrong == []
    assert tally.skipped == 0
    return tally


def test_rewards_and_verdicts_of_d1():
    assert check("rewards_d1.jsonl.gz").equal > 2500


def test_prompts_of_both_protocols():
    assert check("prompts.jsonl").equal > 100


def test_accuracies_of_the_released_generations_of_d1():
    tally = check("parsers_d1_256.jsonl.gz")
    assert tally.scores == {
        "gsm8k": [863, 1130],
        "math500": [162, 500],
        "countdown": [50, 256],
        "sudoku": [137, 2048],
    }


@pytest.mark.slow
def test_rewards_and_verdicts_of_agrpo():
    assert check("rewards_agrpo.jsonl.gz").equal > 3200


def test_some_rewards_and_verdicts_of_agrpo(tmp_path):
    with gzip.open(FIXTURES / "rewards_agrpo.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    few = [row for row in rows if row["task"] in ("countdown", "sudoku")]
    few += [
        row
        for row in rows
        if row["task"] in ("gsm8k", "math500") and "reference_seconds" not in row
    ][::12]
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(map(json.dumps, few)))
    tally = check_rewards.check_file(path)
    assert tally.wrong == []
    assert tally.equal > 1000


def test_a_difference_is_excused_only_in_the_function_that_is_marked(tmp_path):
    row = {
        "id": "made",
        "task": "countdown",
        "completion": "<answer>1+2 = 3</answer>",
        "target": 3,
        "nums": [1, 2],
        "rewards": {"countdown_format_reward": 0.5, "countdown_correctness_reward": 0.0},
        "eval": {"parse_ans": "1+2 = 3", "grade": False},
        "reference_quirk": "countdown_correctness_reward: a fault",
        "quirk_in": ["countdown_correctness_reward"],
    }
    path = tmp_path / "made.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({"task": "chess", "rewards": {}}))
    tally = check_rewards.check_file(path)
    assert [line.split(":")[0] for line in tally.wrong] == ["made countdown_format_reward"]
    assert len(tally.chosen) == 2  # the reward, and the verdict by the same rule
    assert tally.skipped == 1


@pytest.mark.parametrize(
    "answer, gold, correct",
    [
        (r"\boxed{2,125}", "2,125", True),
        (r"\boxed{2125}", "2,125", True),
        ("2,125 meters", "2,125", True),
        ("2", "2,125", False),
        ("-10", "-10", True),
        ("10", "-10", False),
        ("18 eggs", "18", True),
        ("18.5", "18", False),
        ("-18", "18", False),
        ("18/2", "18", False),
        ("36/2", "18", True),
        ("18 and 19", "18", False),
        ("3,000", "3", False),
        ("eighteen", "18", False),
    ],
)
def test_verdict_of_gsm8k_reads_the_whole_number(answer, gold, correct):
    text = f"<think>1 + 1</think><answer>{answer}</answer>"
    assert agrpo.gsm8k_verdict(text, {"answer": gold}) == correct


@pytest.mark.parametrize(
    "left, solves",
    [
        ("30-100+93", True),
        ("((30-100)+93)", True),  # math-verify cannot read it
        ("**30 - (100 - 93)", True),
        ("$30-100+93$", True),
        (r"\(30-100+93\)", True),
        ("30-100+93,", True),
        ("30" + " " * 20_000 + "-100+93", True),
        ("- 100 + 30 + 93", True),
        ("30 100 93 23", False),
        ("30+100-93", False),
        ("30-100+93#", False),
        ("30-100+93j", False),
        ("93-30//100-0*100", False),
        ("23 30 100 93", False),
    ],
)
def test_equation_of_countdown_is_judged_by_what_stands_on_the_left(left, solves):
    fields = {"numbers": [30, 100, 93], "target": 23}
    text = f"<answer>{left} = 23</answer>"
    assert agrpo.countdown_correctness_reward(text, fields) == 3.0 * solves
    assert agrpo.countdown_verdict(text, fields) == solves


@pytest.mark.parametrize("left", ["90, 90, 43", "90 90 43", "43 * 90 // 90"])
def test_numbers_in_a_row_solve_nothing(left):
    fields = {"numbers": [90, 43, 90], "target": 43}
    assert agrpo.countdown_correctness_reward(f"<answer>{left} = 43</answer>", fields) == 0.0
