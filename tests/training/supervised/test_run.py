"""Runs on rows: resumed within an epoch to the same bits, the same losses in every layout."""

import json
import random

import pytest
import torch.distributed as dist

from agrpo_megatron.runs.directory import progress, resolve_run
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.test_run import read
from tests.training.tiny import same_metrics, silent_view, tiny

RUN = [
    "task.name=missing.py",  # is not read
    "sft.epochs=1.5",
    "sft.batch_size=8",
    "sft.eval_fraction=0.1",
    "sft.eval_interval=4",
    "checkpoint.interval=2",
    "train.token_budget=128",
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Write forty conversations of one to three turns."""
    path, draw = tmp_path_factory.mktemp("data") / "chats.jsonl", random.Random(0)
    with path.open("w") as file:
        for number in range(40):
            talk = [{"role": "system", "content": "say"}] if number % 3 == 0 else []
            for _ in range(draw.randint(1, 3)):
                text = "".join(draw.choices("abc", k=draw.randint(1, 4)))
                talk += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": text[::-1]},
                ]
            file.write(json.dumps({"messages": talk}) + "\n")
    return path


def train_until(resolved, stop_after):
    """Run the supervised phase; an interrupt ends it after an iteration, if one is named."""
    progress(resolved.settings)
    view = silent_view()

    def sft(metrics):
        if metrics["iteration"] == stop_after:
            raise KeyboardInterrupt

    view.sft = sft
    try:
        train(resolved, view, phases=("sft",))
    except KeyboardInterrupt:
        assert stop_after is not None


def _train(run_dir, chats, overrides=(), stop_after=None):
    world = dist.get_world_size()
    settings = tiny(f"run.dir={run_dir}", f"sft.data={chats}", *RUN, *overrides)
    resolved = resolve_run(settings, world_size=world, phases=("sft",))
    train_until(resolved, stop_after)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, chats):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run_ranks(1, _train, directory, chats)
    return directory


def test_a_run_resumes_within_an_epoch_to_the_same_bits(whole, tmp_path, chats):
    run_ranks(1, _train, tmp_path / "run", chats, (), 3)
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 3
    run_ranks(1, _train, tmp_path / "run", chats)
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert same_metrics(metrics, read(whole / "metrics.jsonl"))
    # 36 rows are trained: 1.5 epochs of them are 54 examples, in 7 iterations of 8.
    assert [record["iteration"] for record in metrics] == [1, 2, 3, 4, 5, 6, 7]
    assert metrics[-1]["epoch"] == pytest.approx(56 / 36)
    held_out = [record.get("held_out_loss") for record in metrics]
    assert [loss is not None for loss in held_out] == [False] * 3 + [True, False, False, True]
    assert held_out[6] < held_out[3]
    assert all(0 < record["memory/host_peak"] < 24 for record in metrics)


@pytest.mark.parametrize(("ranks", "layout"), [(2, "dp2"), (4, "tp2-sp-cp2"), (4, "pp2-dp2")])
def test_every_layout_has_the_same_losses(whole, tmp_path, chats, ranks, layout):
    """Context parallelism cuts some of the rows."""
    run_ranks(ranks, _train, tmp_path / "run", chats, [f"parallel={layout}"])
    metrics, expected = read(tmp_path / "run" / "metrics.jsonl"), read(whole / "metrics.jsonl")
    for name in ("loss", "held_out_loss", "epoch", "scored_tokens"):
        ours, theirs = ([m.get(name) for m in records] for records in (metrics, expected))
        assert ours == [None if t is None else pytest.approx(t, rel=1e-4) for t in theirs]


def test_a_run_whose_rows_changed_does_not_resume(whole, tmp_path, chats):
    changed = tmp_path / "chats.jsonl"
    changed.write_text(chats.read_text().replace("abc", "abb"))
    assert changed.read_text() != chats.read_text()
    said = "holds a run whose supervised rows changed; restore them"
    with pytest.raises(AssertionError, match=said):
        run_ranks(1, _train, whole, changed)


def _then_rl(run_dir, chats):
    own = ["task.name=countdown", "train.iterations=1"]
    settings = tiny(f"run.dir={run_dir}", f"sft.data={chats}", *RUN[1:], *own)
    train(resolve_run(settings, world_size=1), silent_view())


def test_rows_come_before_rl_in_one_file(tmp_path, chats):
    run_ranks(1, _then_rl, tmp_path / "run", chats)
    phases = [record["phase"] for record in read(tmp_path / "run" / "metrics.jsonl")]
    assert phases == ["sft"] * 7 + ["eval", "rl", "eval"]
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert set(data) == {
        "training problems",
        "held-out problems",
        "supervised rows",
        "held-out supervised rows",
    }
