"""Run directories as they are found: finished, cut off, resumed, empty."""

import json

import numpy as np
import pytest

from agrpo_megatron.evaluation.statistics import wilson
from agrpo_megatron.reports.read import after, before, read_run, series, smooth, time_totals
from agrpo_megatron.reports.text import duration, tail_start, visible
from tests.reports.synthetic import write_lines, write_run


def test_cut_off_line_and_missing_files_are_tolerated(tmp_path):
    lines = [{"phase": "rl", "iteration": i, "accuracy": i / 10} for i in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"phase": "rl", "iteration": 3, "accu')
    run = read_run(tmp_path)
    assert series(run.rl, "accuracy")[1].tolist() == [0.1, 0.2]
    assert (run.unreadable_lines, run.samples, run.settings) == (1, (), {})


def test_resume_drops_the_iterations_it_rolled_back(tmp_path):
    rows = [{"phase": "rl", "iteration": i, "loss": 0.0} for i in (1, 2, 3, 4)]
    rows += [{"phase": "eval", "iteration": 4, "stage": "interval", "accuracy": 0.1}]
    rows += [{"phase": "rl", "iteration": i, "loss": 1.0} for i in (3,)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    x, y = series(read_run(tmp_path).rl, "loss")
    assert (x.tolist(), y.tolist()) == ([1, 2, 3], [0, 0, 1])


def test_values_that_are_missing_or_not_finite_are_left_out():
    rows = [{"iteration": i, "kl": v} for i, v in enumerate((0.5, float("nan"), None, True, 2))]
    x, y = series([*rows, {"iteration": 9}], "kl")
    assert (x.tolist(), y.tolist()) == ([0, 4], [0.5, 2.0])


def test_directories_without_metrics_are_refused_with_the_fix(tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics.jsonl; give the run.dir"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no metrics yet"):
        read_run(tmp_path)


def test_before_and_after_and_seconds_by_part(tmp_path):
    rl = {"phase": "rl", "iteration": 1, "timing/rollout": 2.0, "timing/update": 1.0}
    rows = [
        {"phase": "sft", "iteration": 1, "timing/iteration": 0.5},
        {"phase": "eval", "iteration": 0, "stage": "before", "accuracy": 0.1},
        rl | {"timing/iteration": 3.5},
        rl | {"iteration": 2, "timing/checkpoint": 4.0, "timing/iteration": 3.5},
        {
            "phase": "eval",
            "iteration": 2,
            "stage": "after",
            "accuracy": 0.4,
            "timing/evaluation": 9,
        },
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    run = read_run(tmp_path)
    assert (before(run), after(run)) == (rows[1], rows[4])
    totals = time_totals(run)
    assert totals["rollout"] == 4.0
    assert totals["other"] == 0.5  # a checkpoint outside timing/iteration is not subtracted twice
    assert sum(totals.values()) == 0.5 + 3.5 + 7.0 + 9.0


def test_running_mean_keeps_constants_and_straight_lines():
    assert np.allclose(smooth(np.full(50, 3.0)), 3.0)
    assert np.allclose(smooth(np.arange(100.0))[20:80], np.arange(100.0)[20:80])


def test_wilson_interval_of_published_example():
    low, high = wilson(0.1, 100)  # 10 of 100
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)
    assert wilson(0.0, 10)[0] == 0.0


def test_pieces_and_durations_are_readable():
    assert visible("a\x1b[31m\u202eb") == "a\ufffd[31m\ufffdb"
    assert visible("\n") == "\u23ce"
    assert tail_start(["x", *["e"] * 4]) == 1
    assert tail_start(["x", *["e"] * 3]) == 4
    assert [duration(s) for s in (0.44, 59.6, 3599.7)] == ["0.4 s", "1 min 00 s", "1 h 00 min"]


def test_synthetic_rows_have_the_keys_they_are_drawn_by(tmp_path):
    run = read_run(write_run(tmp_path))
    assert (len(run.sft), len(run.rl), len(run.evaluations)) == (120, 200, 9)
