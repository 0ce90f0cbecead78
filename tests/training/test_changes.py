"""A run resumes with other settings: from there on it is a run that always had them, to the bit."""

import json

from agrpo_megatron.runs.progress import latest_checkpoint
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.test_run import read
from tests.training.tiny import resolved_run, same_metrics, silent_view

RUN = ["checkpoint.interval=2", "evaluation.interval=2", "optimizer.warmup_iterations=1"]


def _train(run_dir, *overrides):
    """Train; return the lines that the terminal shows."""
    shown = []
    view = silent_view()
    view.note = shown.append  # type: ignore[method-assign]
    train(resolved_run(run_dir, *RUN, *overrides), view)
    return shown


def _extended(folder):
    """Train for 2 iterations and resume up to 4; and train for 4 at once."""
    _train(folder / "run", "train.iterations=2")
    shown = _train(folder / "run", "train.iterations=4")
    _train(folder / "whole", "train.iterations=4")
    return shown


def _rl(run_dir):
    return [row for row in read(run_dir / "metrics.jsonl") if row["phase"] == "rl"]


def test_a_finished_run_that_is_extended_equals_a_longer_one(tmp_path):
    (shown,) = run_ranks(1, _extended, tmp_path)
    assert shown[:2] == [
        "resuming after rl iteration 2",
        "from here on train.iterations: 2 -> 4",
    ]
    ours, theirs = tmp_path / "run", tmp_path / "whole"
    assert same_metrics(_rl(ours), _rl(theirs)) and len(_rl(ours)) == 4
    stages = [row["stage"] for row in read(ours / "metrics.jsonl") if row["phase"] == "eval"]
    assert stages == ["before", "after", "after"]  # the first end was an end
    tensors = [sorted((run / "checkpoints").glob("rl-000004/*.distcp")) for run in (ours, theirs)]
    sizes = [[(path.name, path.read_bytes()) for path in own] for own in tensors]
    assert sizes[0] == sizes[1] and sizes[0]


def _changed(folder):
    """Change the schedule twice, once before a run's first RL checkpoint."""
    run, sft = folder / "run", ["sft.iterations=2", "sft.optimizer.decay=linear"]
    _train(run, *sft, "train.iterations=0")
    longer = [sft[1], "sft.iterations=3", "sft.optimizer.learning_rate=1e-3"]
    _train(run, *longer, "train.iterations=2", "optimizer.decay=cosine")
    last = [
        "train.iterations=4",
        "optimizer.learning_rate=2e-3",
        "optimizer.min_learning_rate=1e-3",
    ]
    _train(run, *longer, *last, "optimizer.decay=linear", "train.token_budget=60")
    return latest_checkpoint(run / "checkpoints")[1].iteration


def test_a_changed_schedule_holds_from_the_next_iteration_on(tmp_path):
    assert run_ranks(1, _changed, tmp_path) == [4]
    rows = read(tmp_path / "run" / "metrics.jsonl")
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    # The supervised phase decays from 1e-4 over two steps, and then from 1e-3 over three.
    # Warm-up takes the first of four steps; the line from 2e-3 to 1e-3 has the other three.
    assert [f"{rate:.4g}" for rate in rates[:2]] == ["5e-05", "0"]
    assert [f"{rate:.4g}" for rate in rates[2:]] == ["0", "0.01", "0", "0.001333", "0.001"]
    lines = (tmp_path / "run" / "changes.jsonl").read_text().splitlines()
    changes = [json.loads(line) for line in lines]
    assert {(c["phase"], c["iteration"]) for c in changes} == {("sft", 2), ("rl", 2)}
    assert {c["key"] for c in changes if c["phase"] == "rl"} == {
        "train.iterations",
        "train.token_budget",
        "optimizer.learning_rate",
        "optimizer.min_learning_rate",
        "optimizer.decay",
    }
