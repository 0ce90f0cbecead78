"""Event files as TensorBoard's own reader reads them: the values of metrics.jsonl, each once."""

import importlib.util
import json

import numpy as np
import pytest

from agrpo_megatron.runs.log import RunLog, check_log
from agrpo_megatron.runs.trackers import named_scalars
from agrpo_megatron.runs.trackers.tensorboard import TensorBoard
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line
from tests.training.test_run import read
from tests.training.tiny import resolved_run, silent_view, tiny

ON = "logging.tensorboard=true"


def curves(run_dir):
    """Return (step, value) pairs by name, of all phases."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in sorted((run_dir / "tensorboard").iterdir()):
        reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        reader.Reload()
        for name in reader.Tags()["scalars"]:
            found[name] = [(event.step, event.value) for event in reader.Scalars(name)]
    return {name: own for name, own in found.items() if own}


def logged(run_dir):
    """Return the same from metrics.jsonl; events hold float32."""
    found = {}
    for record in read(run_dir / "metrics.jsonl"):
        for name, value in named_scalars(record).items():
            if not isinstance(value, str):
                step = (record["iteration"], float(np.float32(value)))
                found.setdefault(name, []).append(step)
    return found


def _train(run_dir, line=None):
    """Train; with `line` kill the process once it has written so many lines."""
    if line is not None:
        kill_after_line(line)
    overrides = [ON, "sft.iterations=2", "train.iterations=4", "evaluation.interval=2"]
    train(resolved_run(run_dir, *overrides, "checkpoint.interval=2"), silent_view())


def test_a_killed_and_resumed_run_has_each_value_once(tmp_path):
    """Lines: sft 1-2, before, rl 1-2, evaluation, rl 3-4, after; killed with rl 3, saved at 2."""
    run_dir = tmp_path / "run"
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, run_dir, 7)
    killed = curves(run_dir)
    assert killed == logged(run_dir)  # a kill loses nothing
    assert [step for step, _ in killed["rl/reward/mean"]] == [1, 2, 3]
    run_ranks(1, _train, run_dir)
    found = curves(run_dir)
    assert found == logged(run_dir)
    assert [step for step, _ in found["rl/by_step/entropy/0"]] == [1, 2, 3, 4]
    assert [step for step, _ in found["eval/accuracy"]] == [0, 2, 4]
    assert [step for step, _ in found["sft/loss"]] == [1, 2]


def _line(phase, iteration):
    return {"phase": phase, "iteration": iteration, "a": float(iteration)}


def test_a_run_that_had_none_gets_its_earlier_lines_and_a_roll_back_drops_later_ones(tmp_path):
    plain = RunLog(tmp_path, settings=tiny(), is_main=True)
    plain.metrics(_line("sft", 1))
    plain.metrics(_line("rl", 1))
    offsets = plain.offsets()
    plain.close()
    log = RunLog(tmp_path, settings=tiny(ON), is_main=True)
    log.cut_back(offsets)
    log.metrics(_line("rl", 2))
    log.metrics(_line("eval", 0))
    log.cut_back(offsets)
    assert {name: steps for name, steps in curves(tmp_path).items() if name.endswith("/a")} == {
        "sft/a": [(1, 1.0)],
        "rl/a": [(1, 1.0)],
    }
    log.metrics(_line("rl", 2))
    log.metrics({**_line("rl", 2), "a": 9.0})  # an early end repeats its evaluation's line
    log.close()
    assert curves(tmp_path)["rl/a"] == [(1, 1.0), (2, 2.0)]


def test_a_phase_without_events_and_without_lines_is_opened_by_its_first_line(tmp_path):
    (tmp_path / "tensorboard" / "rl").mkdir(parents=True)
    board = TensorBoard(tmp_path)
    board.restart([{"phase": "sft", "iteration": 1, "loss": 2.0}])
    board.send(0, {"phase": "rl", "iteration": 1, "loss": 1.0})
    board.close()
    found = curves(tmp_path)
    assert (found["sft/loss"], found["rl/loss"]) == ([(1, 2.0)], [(1, 1.0)])


def test_a_missing_package_is_refused_or_left_out(tmp_path, monkeypatch):
    own = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "tensorboard" else own(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ValueError, match=r"pip install 'agrpo-megatron\[tensorboard\]'"):
        check_log(tiny(ON, f"run.dir={tmp_path}"))
    for value in ("auto", "false"):
        log = RunLog(tmp_path, settings=tiny(f"logging.tensorboard={value}"), is_main=True)
        log.metrics(_line("rl", 1))
        log.close()
    assert not (tmp_path / "tensorboard").exists()
    assert len(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])) == 4


def test_what_it_is_set_to_is_true_false_or_auto():
    with pytest.raises(ValueError, match="logging.tensorboard='on' has the wrong type; it must be"):
        tiny("logging.tensorboard='on'")
