"""A supervised phase on a file of preference pairs, as `agrpo sft` runs it."""

import json
import math

import pytest

from agrpo_megatron.runs.directory import resolve_run
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line
from tests.training.test_run import read
from tests.training.tiny import same_metrics, silent_view, tiny, unknown_metrics

RUN = [
    "sft.loss=vrpo",
    "sft.preferences.masks=2",
    "sft.preferences.beta=1.0",
    "sft.iterations=6",
    "sft.eval_interval=3",
    "sft.optimizer.learning_rate=1e-2",
    "sft.batch_size=4",
    "checkpoint.interval=2",
]
ADAPTERS = ["lora.rank=4", "sft.iterations=2", "sft.optimizer.learning_rate=3e-2"]


def _write(folder):
    """Write pairs of sums, of which those with the smaller number first are chosen."""
    names = {"train": range(1, 8), "eval": (8,)}
    for name, numbers in names.items():
        rows = [
            {"prompt": f"{a} {b}:", "chosen": f"{a}+{b}", "rejected": f"{b}+{a}"}
            for a in numbers
            for b in range(a + 1, 10)
        ]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return [f"sft.data={folder}/train.jsonl", f"sft.eval_data={folder}/eval.jsonl"]


def _train(run_dir, overrides, line=None):
    if line is not None:
        kill_after_line(line)
    settings = tiny(f"run.dir={run_dir}", *RUN, *overrides)
    resolved = resolve_run(settings, world_size=1, phases=("sft",))
    train(resolved, silent_view(), phases=("sft",))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    overrides = _write(folder)
    run_ranks(1, _train, folder / "whole", overrides)
    return folder / "whole", overrides


def test_margins_grow_from_zero_and_every_metric_is_explained(whole):
    metrics = read(whole[0] / "metrics.jsonl")
    assert [record["iteration"] for record in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics[0]["preference/margin"] == metrics[0]["preference/accuracy"] == 0.0
    held = [record for record in metrics if "held_out_loss" in record]
    assert [record["iteration"] for record in held] == [3, 6]
    assert held[-1]["held_out_loss"] < math.log(2)
    assert held[-1]["held_out_preference/margin"] > 0
    assert not unknown_metrics(metrics)


def test_a_killed_run_resumes_to_the_same_bits_against_its_own_start(whole, tmp_path):
    """It starts from the weights of an earlier run, which are its reference after a restart."""
    overrides = [*whole[1], f"model.load={whole[0]}", "sft.eval_data=null", "sft.eval_interval=0"]
    run_ranks(1, _train, tmp_path / "whole", overrides)
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", overrides, 5)
    run_ranks(1, _train, tmp_path / "run", overrides)
    expected = read(tmp_path / "whole" / "metrics.jsonl")
    assert expected[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert same_metrics(read(tmp_path / "run" / "metrics.jsonl"), expected)


def test_the_reference_of_adapters_is_the_model_without_them(whole, tmp_path):
    run_ranks(1, _train, tmp_path / "run", [*whole[1], *ADAPTERS])
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert metrics[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(metrics[1]["preference/margin"]) > 1e-3


def test_an_update_that_is_not_finite_names_its_pairs(whole, tmp_path):
    huge = ["sft.optimizer.learning_rate=1e30", "sft.optimizer.clip_grad=0"]
    with pytest.raises(AssertionError, match=r"sft iteration 2: .* is not finite"):
        run_ranks(1, _train, tmp_path / "run", [*whole[1], *huge])
    [record] = read(tmp_path / "run" / "nonfinite.jsonl")
    assert all("train.jsonl, row " in name for name in record["problems"])
    assert len(record["problems"]) == 8  # both texts of four pairs
