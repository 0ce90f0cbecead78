"""The te layers match the local ones, packed or not, and read their checkpoints."""

from functools import cache
from pathlib import Path

import pytest
import torch

from agrpo_megatron.checkpoint.saving import Saver
from agrpo_megatron.checkpoint.sharded import load_checkpoint, load_weights
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.runs.progress import Progress
from tests.gpu.common import (
    SCALE,
    engine_of,
    gradients_of,
    local,
    logits_of,
    one_row,
    relative,
    te,
    update,
    weights_of,
)
from tools.gpu_model import random_batch

pytestmark = pytest.mark.gpu

# Settings, and how far packed rows may be from rows alone, as a multiple of their error. A tensor's
# scale is of all rows together: packed and alone are two roundings, independent ones differ by
# sqrt(2) times the error of each.
PACKED = [
    (local("fp32"), 1.0),
    (local("bf16"), 1.0),
    (te("bf16"), 1.0),
    (te("fp8 blockwise"), 1.0),
    (te("fp8 tensorwise"), 2.0),
]


def _rounded(weights):
    """Return weights that bfloat16 holds exactly: all precisions then compute the same model."""
    return {name: w.to(torch.bfloat16).float() for name, w in weights.items()}


@cache
def _weights(head_dim=128):
    with engine_of(*_with_heads(local("fp32"), head_dim)) as (engine, _):
        return _rounded(weights_of(engine.network))


@cache
def _logits_and_gradients(overrides, head_dim=128):
    chosen = _with_heads(overrides, head_dim)
    with engine_of(*chosen, weights=_weights(head_dim)) as (engine, _):
        batch = random_batch(SCALE, seed=5, device=engine.ranks.device)
        return logits_of(engine.network, batch.rows), gradients_of(engine, [batch])


def _with_heads(overrides, head_dim):
    return (*overrides, f"model.num_attention_heads={SCALE.hidden // head_dim}")


def _kind(name):
    """Return the kind of a weight, without its layer."""
    return name.split("layers.")[-1].partition(".")[2] if "layers." in name else name


def _errors(found, reference):
    """Return the relative error of the logits, and of the gradients of each kind of weight."""
    (logits, gradients), (true_logits, true_gradients) = found, reference
    kinds = sorted({_kind(name) for name in true_gradients})
    errors = {"logits": relative(logits, true_logits)}
    for kind in kinds:
        names = [name for name in true_gradients if _kind(name) == kind]
        ours, theirs = (
            torch.cat([each[name].flatten() for name in names])
            for each in (gradients, true_gradients)
        )
        errors[kind] = relative(ours, theirs)
    return errors


@pytest.mark.parametrize("head_dim", [64, 128])
def test_te_is_as_near_to_float32_as_the_local_spec(head_dim, record_property):
    reference = _logits_and_gradients(local("fp32"), head_dim)
    ours = _errors(_logits_and_gradients(te("bf16"), head_dim), reference)
    theirs = _errors(_logits_and_gradients(local("bf16"), head_dim), reference)
    for name in ("logits", "self_attention.linear_qkv.weight"):
        record_property(f"error/te/{head_dim}/{name}", ours[name])
        record_property(f"error/local/{head_dim}/{name}", theirs[name])
    assert 1e-4 < theirs["logits"] < 0.05, theirs
    assert {name: e for name, e in ours.items() if e > 1.5 * theirs[name]} == {}, theirs


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_fp8_is_near_to_bf16(recipe, record_property):
    """FP8 has 3 bits after the point: a product errs by some hundredths, and they add up."""
    reference = _logits_and_gradients(local("fp32"))
    errors = _errors(_logits_and_gradients(te(f"fp8 {recipe}")), reference)
    record_property(f"error/fp8 {recipe}/logits", errors["logits"])
    assert 0.01 < errors["logits"] < 0.25, errors
    assert max(errors.values()) < 0.4, errors


@pytest.mark.parametrize(("overrides", "most"), PACKED, ids=[" ".join(case) for case, _ in PACKED])
def test_packed_rows_do_not_see_one_another(overrides, most, record_property):
    """Rows packed together err from rows alone about as the precision errs from float32, or less.

    A row that sees another one has other logits: that error is about 1.
    """
    with engine_of(*_with_heads(overrides, 128), weights=_weights()) as (engine, _):
        rows = random_batch(SCALE, seed=5, device=engine.ranks.device).rows
        packed = logits_of(engine.network, rows)
        parts = [one_row(rows, number) for number in range(SCALE.rows)]
        alone = torch.cat([logits_of(engine.network, part) for part in parts])
    exact, _ = _logits_and_gradients(local("fp32"))
    assert len(parts) == SCALE.rows > 1 and len(packed) == len(alone) == len(exact)
    error = max(relative(alone, exact), 1e-5)
    record_property(f"packed/{' '.join(overrides)}/of the error", relative(packed, alone) / error)
    assert error < 0.25 and relative(packed, alone) <= most * error


@pytest.mark.parametrize("overrides", [te("bf16"), te("fp8 blockwise")], ids=["bf16", "fp8"])
def test_checkpoints_move_between_the_specs(tmp_path, overrides):
    """Weights saved from local layers are those of te layers, and back, to the bit."""
    with engine_of(*local("bf16")) as (engine, settings):
        update(engine, settings)  # so that there are moments
        saved, path = weights_of(engine.network), _save(tmp_path / "local", engine)
    with engine_of(*overrides, "run.seed=1") as (engine, _):
        assert not _same(engine.network, saved)
        load_checkpoint(path, engine)
        assert _same(engine.network, saved)
        back = _save(tmp_path / "te", engine)
    with engine_of(*local("bf16"), "run.seed=2") as (engine, _):
        load_weights(back, engine.network)
        assert _same(engine.network, saved)


def _save(root: Path, engine) -> Path:
    saver = Saver(root, engine, keep=1, is_async=False, files=None)
    return saver.save(Progress("sft", 1, {}))


def _same(network: Network, weights) -> bool:
    mine = weights_of(network)
    assert set(mine) == set(weights)
    return all(torch.equal(mine[name], weights[name]) for name in weights)
