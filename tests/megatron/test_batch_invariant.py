"""Megatron's batch-invariant kernels are in place within a forward pass, and nowhere else.

Without a GPU they are registered for the CPU. Megatron's own functions run; plain torch computes
what they leave to Triton, and refuses what Triton's kernels do not compile for.
"""

import math
from collections import Counter

import pytest
import torch

from agrpo_megatron.megatron.layers.packed import packed_layout
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.types import PackedRows
from tests.ranks import run_ranks
from tests.training.tiny import open_session

TOP_K = "sampling.top_k=20"


def replace_triton(*, has_te=False):
    """Return Megatron's module with plain torch for Triton, and the counts of its calls."""
    from megatron.core.transformer.custom_layers import batch_invariant_kernels as kernels

    calls = Counter()

    def count(name, *operands):
        calls[name] += 1
        # The stand-ins for the kernels of Transformer Engine compute in float64.
        if not has_te and any(x.dtype == torch.float64 for x in operands):
            raise TypeError(f"{name} has no kernel for float64")

    def product(a, b, bias=None):
        count("product", a, b)
        result = torch.bmm(a[None], b[None])[0]
        return result if bias is None else result + bias

    def log_softmax(x, dim=-1):
        count("log_softmax", x)
        return x - x.logsumexp(dim, keepdim=True)

    def mean(x, dim, *, keepdim=False):
        count("mean", x)
        return x.sum(dim, keepdim) / x.shape[dim]

    kernels.matmul_persistent, kernels.log_softmax, kernels.mean_dim = product, log_softmax, mean
    torch.accelerator.current_accelerator = lambda **_: None
    if not has_te:
        kernels._te_patch_for_batch_invariant = lambda: None
        kernels._te_unpatch_for_batch_invariant = lambda: None
    return kernels, calls


def _session(*overrides):
    session, engine = open_session(*overrides)
    # The settings ask for it only with the te layers.
    engine.network.config.batch_invariant_mode = True
    return session, engine


def _iterate(*overrides):
    """Return the metrics of an iteration, the calls, and whether the kernels are still there."""
    kernels, calls = replace_triton()
    session, engine = _session(*overrides)
    rollout, _ = collect_rollout(session, engine, 0)
    sampled = calls["product"]
    metrics, _ = update_policy(session, engine, rollout, None)
    after = kernels.is_batch_invariant_mode_enabled(), torch.tensor([1.0, 2.0, 3.0]).mean().item()
    return metrics, (sampled, calls["product"] - sampled), after


def _iterate_throughout(*overrides):
    """Return how an iteration ends where the kernels are in place for the whole process."""
    kernels, _ = replace_triton()
    session, engine = _session(*overrides)
    kernels.enable_batch_invariant_mode()
    try:
        rollout, _ = collect_rollout(session, engine, 0)
        update_policy(session, engine, rollout, None)
    except (AssertionError, TypeError) as error:
        return str(error)
    return "it passed"


def _forward_and_backward():
    """Return the products of a forward, of its backward, and of its two parts, as graphs run it."""
    _, calls = replace_triton()
    _, engine = _session()
    model = engine.network.chunks[0]
    rows = PackedRows(torch.arange(4), torch.tensor([0, 4], dtype=torch.int32), torch.arange(4))
    layout = packed_layout(rows, angles=model.angles, context=engine.ranks.context)
    counts = []

    def counted(run):
        before = calls["product"]
        result = run()
        counts.append(calls["product"] - before)
        return result

    total = counted(lambda: model(rows)).sum()
    counted(total.backward)
    hidden = counted(lambda: model.body(rows.tokens, layout))
    counted(lambda: model.head(hidden, rows.scored))
    return counts


@pytest.mark.parametrize("overrides", [(), (TOP_K,)], ids=["no top-k", "top-k"])
def test_an_iteration_passes(overrides):
    metrics, (sampled, trained), after = run_ranks(1, _iterate, *overrides)[0]
    lists = [value if isinstance(value, list) else [value] for value in metrics.values()]
    values = [value for part in lists for value in part if value is not None]  # None: not scored
    assert all(map(math.isfinite, values)) and metrics["grad_norm"] > 0
    assert any(value is not None for value in metrics["by_step/ratio_error"])
    assert metrics["ratio/max_error"] < 1e-4
    assert sampled > 0 and trained > 0
    assert after == (False, 2.0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [((), "only float types supported"), ((TOP_K,), "log_softmax has no kernel for float64")],
    ids=["no top-k", "top-k"],
)
def test_it_would_fail_with_the_kernels_throughout(overrides, said):
    assert said in run_ranks(1, _iterate_throughout, *overrides)[0]


def test_every_forward_has_them_and_no_backward_pass():
    """The body alone has all queries, in one product with the keys and values of the last layer."""
    forward, backward, body, head = run_ranks(1, _forward_and_backward)[0]
    assert body > 0 and head > 0 and forward == body + head + 1 and backward == 0
