"""What an engine holds on the GPU is what `scaling.memory` says; activations are near it."""

from functools import cache

import pytest
import torch

from agrpo_megatron.scaling.memory import rank_memory
from tests.gpu.common import (
    REHEARSES,
    SCALE,
    allocated,
    engine_of,
    gradients_of,
    local,
    te,
    update,
)
from tools.gpu_model import random_batch

pytestmark = pytest.mark.gpu

DISTRIBUTED = "optimizer.distributed=true"
# Kernels, and settings of what they keep.
CASES = {
    "local fp32": (local("fp32"),),
    "local bf16": (local("bf16"),),
    "te bf16": (te("bf16"),),
    "te bf16 distributed": (te("bf16"), DISTRIBUTED),
    "te bf16, moments bf16": (te("bf16"), DISTRIBUTED, "optimizer.moments=bf16"),
    "te bf16, moments fp8": (te("bf16"), DISTRIBUTED, "optimizer.moments=fp8"),
    "te bf16, gradients bf16": (te("bf16"), DISTRIBUTED, "optimizer.main_gradients=bf16"),
    "te fp8 blockwise": (te("fp8 blockwise"),),
    "te fp8 tensorwise": (te("fp8 tensorwise"),),
    "te fp8 blockwise, primary": (te("fp8 blockwise"), DISTRIBUTED, "fp8.primary_weights=true"),
}
ROUNDED = 512  # bytes that the allocator rounds a tensor up to
SLACK = 1 << (16 if REHEARSES else 21)  # bytes not counted: scales, counters


@pytest.mark.parametrize("chosen", CASES.values(), ids=CASES)
def test_held_and_kept_memory_is_as_predicted(chosen, record_property, request):
    kernels, *more = chosen
    _warm_up(kernels)
    before = allocated()
    with engine_of(*kernels, *more) as (engine, settings):
        update(engine, settings)
        held = allocated() - before
        predicted = rank_memory(settings, 1, stage=0)
        tensors = len(list(engine.network.named_parameters()))
        kept = None if REHEARSES else _kept(engine)
    room = predicted.activations + predicted.logits
    expected = predicted.total - room
    case = request.node.callspec.id
    record_property(f"memory/{case}/held, of the prediction", held / expected)
    assert abs(held - expected) < SLACK + 8 * ROUNDED * tensors + expected // 200
    if kept is not None:
        record_property(f"memory/{case}/activations, of the estimate", kept / room)
        assert room / 2 < kept < 1.6 * room


@cache
def _warm_up(kernels):
    """Let the libraries allocate what they keep for good, once for each kind of kernels."""
    with engine_of(*kernels, DISTRIBUTED) as (engine, settings):
        update(engine, settings)


def _kept(engine):
    """Return by how many bytes a forward and backward of one micro-batch raises the peak."""
    batch = random_batch(SCALE, seed=9, device=engine.ranks.device)
    start = allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = gradients_of(engine, [batch])
    copies = sum(gradient.nbytes for gradient in gradients.values())
    peak = torch.cuda.max_memory_allocated() - start
    del gradients
    return peak - copies if peak > 2 * copies else peak
