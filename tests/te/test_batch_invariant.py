"""Megatron's batch-invariant kernels in the te layers: forwards have them, gradients add up."""

import pytest

from tests.megatron.test_batch_invariant import replace_triton
from tests.ranks import run_ranks
from tests.te.models import BF16, TE, errors, opened, sft_gradient
from tests.te.rules import calls


def _gradient(where):
    """Return loss and gradient of two micro-batches, and the products by either kernel.

    Args:
        where: the kernels are in place in a forward, in the whole process, or nowhere.
    """
    session, engine = opened(BF16, TE)
    assert engine.network.config.gradient_accumulation_fusion
    invariant, counts = replace_triton(has_te=True)
    engine.network.config.batch_invariant_mode = where == "forward"
    if where == "process":
        invariant.enable_batch_invariant_mode()
    calls.clear()
    loss, gradient = sft_gradient(session, engine)
    return loss, gradient, counts["product"], calls["generic_gemm"]


@pytest.fixture(scope="module")
def usual():
    """Return loss and gradient without them, and the number of products."""
    [(loss, gradient, none, products)] = run_ranks(1, _gradient, "nowhere")
    assert none == 0
    return loss, gradient, products


def test_gradients_add_up_over_micro_batches(usual):
    loss, gradient, products = usual
    [(ours, found, invariant, left)] = run_ranks(1, _gradient, "forward")
    # Of three products in a layer's forward and backward, one is of the forward. The head's are
    # torch's, which are not counted without the kernels.
    assert left * 3 == products * 2 and invariant > products // 3
    assert ours == pytest.approx(loss, rel=0.01)
    assert max(errors(found, gradient).values()) < 0.05


def test_they_would_not_with_the_kernels_throughout(usual):
    _, gradient, _ = usual
    [(_, found, _, left)] = run_ranks(1, _gradient, "process")
    assert left == 0
    assert max(errors(found, gradient).values()) > 0.3
