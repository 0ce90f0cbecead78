"""Whole runs: what a run directory holds, and that it can be run again as it is."""

import json
from pathlib import Path

import pytest

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.progress import read_progress
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.tiny import resolved_run, same_metrics, silent_view, unknown_metrics

RUN = [
    "sft.iterations=2",
    "train.iterations=2",
    "evaluation.interval=1",
    "checkpoint.interval=1",
    "checkpoint.keep=1",
    "logging.samples=2",
]
METRICS = {
    "sft": {"loss", "grad_norm", "learning_rate", "scored_tokens"},
    "rl": {
        "reward/mean",
        "reward/std",
        "accuracy",
        "entropy",
        "live_steps/mean",
        "completions/mean_length",
        "zero_advantage_fraction",
        "loss",
        "grad_norm",
        "learning_rate",
        "ratio/mean",
        "ratio/max_error",
        "ratio/p99_error",
        "clip_fraction",
        "kl",
        "rows",
        "micro_batches",
        "perf/packing_efficiency",
        "timing/rollout",
        "timing/reward",
        "timing/update",
    },
    "eval": {"stage", "problems", "accuracy", "reward/mean"},
}


def _train(run_dir, overrides, phases=("sft", "rl")):
    train(resolved_run(run_dir, *overrides), silent_view(), phases=phases)


def _train_again(run_dir, new_dir):
    """Run the resolved settings of a finished run, in another directory."""
    settings = load(Settings, Path(run_dir) / "config.yaml", [f"run.dir={new_dir}"])
    again = resolve(settings, world_size=1)
    assert again.settings == settings, "resolved settings resolve to themselves"
    _train(new_dir, [*RUN, f"tokenizer.path={settings.tokenizer.path or 'null'}"])


def read(path):
    """Return the records of a log."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the directory of a finished run of both phases."""
    directory = tmp_path_factory.mktemp("runs") / "both"
    run_ranks(1, _train, directory, RUN)
    return directory


def test_metrics_tell_every_iteration_and_evaluation_in_order(run):
    records = read(run / "metrics.jsonl")
    assert [(r["phase"], r["iteration"], r.get("stage")) for r in records] == [
        ("sft", 1, None),
        ("sft", 2, None),
        ("eval", 0, "before"),
        ("rl", 1, None),
        ("eval", 1, "interval"),
        ("rl", 2, None),
        ("eval", 2, "after"),
    ]
    for record in records:
        assert METRICS[record["phase"]] <= record.keys()
    assert unknown_metrics(records) == set()
    for record in (r for r in records if r["phase"] == "rl"):
        assert record["ratio/max_error"] < 1e-5
        assert 0 < record["perf/packing_efficiency"] <= 1
        times = [record[f"timing/{part}"] for part in ("rollout", "reward", "update")]
        assert 0 < sum(times) <= record["timing/iteration"]


def test_samples_can_be_drawn_step_by_step(run):
    samples = read(run / "samples.jsonl")
    assert len(samples) == 2 * 5
    for sample in samples:
        assert len(sample["pieces"]) == len(sample["unmask_step"]) == 8
        assert max(sample["unmask_step"]) < sample["num_steps"] <= 4
        assert {"prompt", "completion", "reward", "correct", "solution"} <= sample.keys()


def test_checkpoints_are_the_end_of_each_phase_and_the_logs_they_belong_to(run):
    root = run / "checkpoints"
    best = (root / "best").read_text()
    kept = {"best", "latest", "rl-000002", "sft-000002", best}
    assert {p.name for p in root.iterdir()} == kept
    evaluations = [m for m in read(run / "metrics.jsonl") if m["phase"] == "eval"][1:]
    top = max(evaluations, key=lambda record: record["accuracy"])
    assert best == f"rl-{top['iteration']:06d}"
    assert (root / "latest").read_text() == "rl-000002"
    progress = read_progress(root / "rl-000002")
    sizes = {name: (run / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")}
    assert progress.offsets == sizes


def test_the_resolved_settings_run_again_to_the_same_numbers(run, tmp_path):
    run_ranks(1, _train_again, run, tmp_path / "again")
    ours, theirs = (read(d / "metrics.jsonl") for d in (tmp_path / "again", run))
    assert same_metrics(ours, theirs)
    assert (tmp_path / "again" / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()


def test_one_phase_after_the_other_equals_both_at_once(run, tmp_path):
    """`agrpo sft` and then `agrpo train` in the same directory."""
    run_ranks(1, _train, tmp_path / "run", RUN, ("sft",))
    assert {r["phase"] for r in read(tmp_path / "run" / "metrics.jsonl")} == {"sft"}
    run_ranks(1, _train, tmp_path / "run", RUN)
    assert same_metrics(read(tmp_path / "run" / "metrics.jsonl"), read(run / "metrics.jsonl"))


def test_a_run_starts_from_the_weights_of_another(run, tmp_path):
    """The evaluation before RL is then the one after the other run."""
    overrides = [*RUN, "sft.iterations=0", "train.iterations=1", f"model.load={run}"]
    run_ranks(1, _train, tmp_path / "next", overrides)
    first = read(tmp_path / "next" / "metrics.jsonl")[0]
    last = read(run / "metrics.jsonl")[-1]
    keys = ("accuracy", "reward/mean", "reward/std")
    assert first["stage"] == "before"
    assert [first[key] for key in keys] == [last[key] for key in keys]


@pytest.mark.parametrize("is_loaded", [False, True], ids=["after sft", "loaded"])
def test_the_reference_of_kl_is_what_rl_started_from(run, tmp_path, is_loaded):
    """The first iteration's KL is 0, the second's is not."""
    start = ["sft.iterations=0", f"model.load={run}"] if is_loaded else []
    run_ranks(1, _train, tmp_path / "kl", [*RUN, *start, "algorithm.kl_coefficient=0.1"])
    records = [r for r in read(tmp_path / "kl" / "metrics.jsonl") if r["phase"] == "rl"]
    assert records[0]["kl"] == 0 and records[1]["kl"] > 1e-6
