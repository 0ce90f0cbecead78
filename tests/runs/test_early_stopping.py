"""A run ends early by a metric of its evaluations: on all ranks, once, and after a restart too."""

import pytest
import torch.distributed as dist

from agrpo_megatron.config.settings import TrainSettings
from agrpo_megatron.runs.directory import is_finished
from agrpo_megatron.runs.early_stopping import with_best, with_early_stop
from agrpo_megatron.runs.progress import Progress, read_progress
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line
from tests.training.test_run import read
from tests.training.tiny import resolved_run, same_metrics, silent_view, tiny

START = Progress("rl", 0, {})


def _judge(values, **settings):
    """Return the progress after evaluations with these accuracies."""
    done, chosen = START, TrainSettings(stop_metric="accuracy", **settings)
    for number, value in enumerate(values):
        assert done.stopped is None, f"stopped before evaluation {number}"
        done = with_early_stop(done, {"accuracy": value}, chosen)
    return done


def test_a_target_that_is_reached_ends_a_run():
    assert _judge([0.1, 0.89], stop_target=0.9).stopped is None
    assert _judge([0.1, 0.9], stop_target=0.9).stopped == "accuracy is 0.9: train.stop_target=0.9"


def test_patience_counts_evaluations_since_the_best():
    assert _judge([0.5, 0.4, 0.6, 0.6], stop_patience=2).stopped is None
    ended = _judge([0.5, 0.4, 0.6, 0.6, 0.5], stop_patience=2)
    assert ended.stopped == "accuracy was never above 0.6 again: train.stop_patience=2"
    assert (ended.stop_best, ended.stop_waited) == (0.6, 2)


def test_without_a_metric_nothing_is_with_early_stop():
    assert with_early_stop(START, {"accuracy": 1.0}, TrainSettings()) is START


def test_the_best_value_is_of_its_own_metric():
    first, is_best = with_best(START, {"accuracy": 0.5}, "accuracy")
    assert (first.best, is_best) == (0.5, True)
    second, is_best = with_best(first, {"accuracy": 0.4, "reward/mean": 0.1}, "accuracy")
    assert (second.best, is_best) == (0.5, False)
    third, is_best = with_best(second, {"accuracy": 0.4, "reward/mean": 0.1}, "reward/mean")
    assert (third.best, third.best_metric, is_best) == (0.1, "reward/mean", True)


def test_an_unknown_metric_names_those_there_are():
    settings = TrainSettings(stop_metric="reward/nothing", stop_patience=1)
    with pytest.raises(ValueError, match=r"train\.stop_metric=reward/nothing: .* use accuracy"):
        with_early_stop(START, {"accuracy": 0.5, "problems": 3}, settings)


RUN = [
    "train.iterations=9",
    "train.stop_metric=reward/mean",
    "train.stop_patience=2",
    "evaluation.interval=1",
    "checkpoint.interval=2",
    "checkpoint.best=null",
]


def _train(run_dir, overrides, line=None):
    """Return what was said, and the iterations that were evaluated in this attempt."""
    if line is not None:
        kill_after_line(line)
    view, said, evaluated = silent_view(), [], []
    view.note = said.append
    view.evaluation = lambda metrics: evaluated.append((metrics["stage"], metrics["iteration"]))
    train(resolved_run(run_dir, *RUN, *overrides, world_size=dist.get_world_size()), view)
    return said, evaluated


def _last(run_dir):
    root = run_dir / "checkpoints"
    return read_progress(root / (root / "latest").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return directory, run_ranks(1, _train, directory, [])[0]


def test_a_run_that_ends_early_is_evaluated_saved_and_finished(whole):
    directory, (said, evaluated) = whole
    records = read(directory / "metrics.jsonl")
    scores = [r["reward/mean"] for r in records if r.get("stage") == "interval"]
    ended = len(scores)
    assert 3 <= ended < 9, "it ends on the way"
    best = max(range(ended), key=scores.__getitem__)
    assert best == ended - 3, "two evaluations after the best"
    assert [r["iteration"] for r in records if r["phase"] == "rl"] == list(range(1, ended + 1))
    *_, decided, last = records
    later = {"stage": "after", "totals/seconds": last["totals/seconds"]}
    assert last == {**decided, **later} and last["totals/seconds"] >= decided["totals/seconds"]
    assert evaluated[-2:] == [("interval", ended), ("after", ended)]
    done = _last(directory)
    assert done.iteration == ended and done.stop_waited == 2 and done.stopped is not None
    assert said[-1] == f"ending early, after iteration {ended}: {done.stopped}"
    assert done.offsets["metrics.jsonl"] == (directory / "metrics.jsonl").stat().st_size
    assert is_finished(tiny(*RUN, f"run.dir={directory}"), done)


def test_a_run_that_ended_early_is_not_taken_up_again(whole):
    directory, _ = whole
    before = (directory / "metrics.jsonl").read_text()
    ((_, evaluated),) = run_ranks(1, _train, directory, [])
    assert evaluated == [] and (directory / "metrics.jsonl").read_text() == before


def test_a_killed_run_ends_where_it_would_have(whole, tmp_path):
    """Killed before the evaluation that decides; what was counted is remembered."""
    directory, _ = whole
    lines = read(directory / "metrics.jsonl")
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", [], len(lines) - 2)
    assert _last(tmp_path / "run").iteration >= 2
    run_ranks(1, _train, tmp_path / "run", [])
    assert same_metrics(read(tmp_path / "run" / "metrics.jsonl"), lines)
    assert _last(tmp_path / "run").stopped == _last(directory).stopped


TYPOS = {
    "train.stop_metric": ["train.stop_metric=reward/typo"],
    "checkpoint.best": ["checkpoint.best=reward/typo", "evaluation.interval=0"],
}


@pytest.mark.parametrize("key", TYPOS)
def test_a_metric_that_evaluations_lack_is_refused_before_anything_is_trained(tmp_path, key):
    no_stop = ["train.stop_metric=null", "train.stop_patience=null"]
    overrides = [*(no_stop if key == "checkpoint.best" else []), *TYPOS[key]]
    with pytest.raises(AssertionError, match=f"{key}=reward/typo: not an evaluation metric; use"):
        run_ranks(1, _train, tmp_path / "run", overrides)
    (record,) = read(tmp_path / "run" / "metrics.jsonl")
    assert record["stage"] == "before"


def test_a_metric_that_evaluations_lack_is_refused_at_a_resume_too(tmp_path):
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", [], 6)  # before, 1, its evaluation, 2, its, 3
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(
        AssertionError, match="checkpoint.best=reward/typo: not an evaluation metric"
    ):
        run_ranks(1, _train, tmp_path / "run", ["checkpoint.best=reward/typo"])
    assert [r["iteration"] for r in read(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 1, 2, 2]


def test_all_ranks_end_together(tmp_path):
    now = ["train.stop_patience=null", "train.stop_target=0"]
    for _, evaluated in run_ranks(2, _train, tmp_path / "run", now):
        assert evaluated == [("before", 0), ("interval", 1), ("after", 1)]
    assert _last(tmp_path / "run").iteration == 1
