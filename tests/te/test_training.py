"""Whole runs and checkpoints with the te spec, and between the specs."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from agrpo_megatron.checkpoint.saving import Saver
from agrpo_megatron.checkpoint.sharded import load_checkpoint
from agrpo_megatron.families import FAMILIES
from agrpo_megatron.megatron.weights import load_hf
from agrpo_megatron.runs.progress import Progress
from agrpo_megatron.training.run import train
from agrpo_megatron.training.sft import run_sft
from tests.ranks import run_ranks
from tests.te import kernels
from tests.te.models import BF16, FP8, LOCAL, MXFP8, SMALL, TE, TENSORWISE, opened, whole_weights
from tests.te.rules import calls
from tests.training.tiny import resolved_run, silent_view

PRECISIONS = {
    "bf16": [BF16],
    "blockwise": [FP8],
    "tensorwise": [FP8, TENSORWISE],
    "mxfp8": [FP8, MXFP8],
    "blockwise, first layer in bf16": [FP8, "fp8.bf16_first_layers=1"],
}
RUN = [
    "train.iterations=2",
    "evaluation.interval=1",
    "checkpoint.interval=1",
    "logging.samples=2",
]


def _train(run_dir, overrides):
    kernels.install(overrides)
    world_size = dist.get_world_size()
    resolved = resolved_run(run_dir, *SMALL, *RUN, *overrides, world_size=world_size)
    train(resolved, silent_view(), phases=("sft", "rl"))
    return dict(calls)


@pytest.mark.parametrize(
    ("precision", "layout"),
    [(precision, "dp1") for precision in PRECISIONS]
    + [("blockwise", layout) for layout in ("tp2-sp", "pp2", "cp2", "pp2-vpp2")]
    + [("tensorwise", "tp2-sp")],
)
def test_a_whole_run(tmp_path, precision, layout):
    overrides = [*PRECISIONS[precision], f"parallel={layout}", f"run.dir={tmp_path}"]
    overrides.append(f"model.num_layers={4 if 'vpp' in layout else 2}")
    counts = run_ranks(1 if layout == "dp1" else 2, _train, tmp_path, overrides)[0]
    assert counts["fused_attn_bwd"] > 0 and counts["multi_tensor_adam"] > 0
    assert ("quantize" in counts) == (precision != "bf16")
    exact = precision != "tensorwise"
    for record in _updates(tmp_path):
        assert record["ratio/max_error"] < (1e-2 if exact else 0.3)


def _updates(run_dir):
    """Return the recorded metrics of a run's two updates."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    updates = [record for record in records if record["phase"] == "rl"]
    assert len(updates) == 2 and all(record["grad_norm"] > 0 for record in updates)
    assert {record["phase"] for record in records} == {"sft", "rl", "eval"}
    return updates


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.05), ("blockwise", 0.2)])
def test_rollouts_in_a_layout_of_their_own_differ_by_rounding(tmp_path, precision, bound):
    """Sums of other parts, each rounded to bf16, and then cast to FP8."""
    overrides = [*PRECISIONS[precision], "parallel=tp2", "rollout.parallel=dp2"]
    run_ranks(2, _train, tmp_path, [*overrides, f"run.dir={tmp_path}", "model.num_layers=2"])
    for record in _updates(tmp_path):
        assert 0 < record["ratio/max_error"] < bound
        assert record["ratio/mean"] == pytest.approx(1, abs=0.02)


def _save(root, overrides):
    """Train a step, save, and return the weights."""
    session, engine = opened(*overrides, world_size=dist.get_world_size())
    run_sft(session, engine, start=0, on_iteration_end=lambda _: None)
    saver = Saver(Path(root), engine, keep=9, is_async=False, files=None)
    return str(saver.save(Progress("sft", 1, {}))), whole_weights(session, engine)


def _load(path, overrides):
    """Load, and return the weights, and the loss of one more step."""
    session, engine = opened(
        "model.init_std=0.3", "sft.iterations=2", *overrides, world_size=dist.get_world_size()
    )
    load_checkpoint(Path(path), engine)
    weights = whole_weights(session, engine)
    run_sft(session, engine, start=1, on_iteration_end=lambda _: None)
    return weights, session.output.log.records[-1]["loss"]


@pytest.mark.parametrize(
    ("saved", "loaded", "layout"),
    [
        ([BF16, LOCAL], [BF16, TE], "dp1"),
        ([BF16, TE], [BF16, LOCAL], "dp1"),
        ([FP8], [BF16, LOCAL], "tp2"),
        ([BF16, LOCAL], [FP8], "tp2"),
        ([FP8], [FP8, TENSORWISE], "dp1"),
    ],
)
def test_a_checkpoint_of_one_spec_loads_under_the_other(tmp_path, saved, loaded, layout):
    [(path, weights)] = run_ranks(1, _save, tmp_path, saved)
    ranks = 1 if layout == "dp1" else 2
    results = run_ranks(ranks, _load, path, [*loaded, f"parallel={layout}"])
    [(_, expected)] = run_ranks(1, _load, path, saved)
    for again, loss in results:
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
        assert loss == pytest.approx(expected, rel=0.1)


def _through_hf(folder, overrides):
    """Load a Hugging Face directory and return its export."""
    session, engine = opened(*overrides, world_size=dist.get_world_size())
    load_hf(engine.network, session.run.settings.model, folder)
    return whole_weights(session, engine)


def _export(folder):
    session, engine = opened(BF16, LOCAL)
    model = session.run.settings.model
    save_file(whole_weights(session, engine), Path(folder) / "model.safetensors")
    (Path(folder) / "config.json").write_text(json.dumps(FAMILIES[model.family].config(model)))


@pytest.mark.parametrize("overrides", [[BF16, TE], [FP8], [FP8, "parallel=tp2"]])
def test_hugging_face_weights_come_back_bit_for_bit(tmp_path, overrides):
    run_ranks(1, _export, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ranks = 2 if "parallel=tp2" in overrides else 1
    for weights in run_ranks(ranks, _through_hf, tmp_path, [*overrides, "run.seed=7"]):
        assert weights.keys() == stored.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
