"""What a rollout says of a token's log-prob, training says too, up to the precision's rounding.

The measure is NVIDIA's token_mult_prob_error: the mean of exp |difference| over all tokens.
"""

import pytest
import torch

from tests.gpu.common import engine_of, in_fresh_process, local, scaled, te
from tests.gpu.rollouts import mismatch, sampled

pytestmark = pytest.mark.gpu

# Name, settings, upper bound of the mean.
CASES = [
    ("local fp32", local("fp32"), 1.0001),
    ("local bf16", local("bf16"), 1.01),
    ("bf16", te("bf16"), 1.01),
    ("fp8 blockwise", te("fp8 blockwise"), 1.03),
    # Its scales are shared by all rows of a pack, and the packs differ.
    ("fp8 tensorwise", te("fp8 tensorwise"), 1.1),
]


@pytest.mark.parametrize(("name", "overrides", "limit"), CASES, ids=[case[0] for case in CASES])
def test_training_scores_tokens_as_the_rollout_did(name, overrides, limit, record_property):
    with engine_of(*overrides) as (engine, settings):
        differences = mismatch(engine, settings).abs()
    mean = float(differences.double().exp().mean())
    record_property(f"mismatch/{name}/mean", mean)
    record_property(f"mismatch/{name}/max |dlogp|", float(differences.max()))
    assert 1.0 <= mean < limit


BATCH_INVARIANT = te("bf16", "kernels.batch_invariant=true")


def _batch_invariant():
    with engine_of(*BATCH_INVARIANT) as (engine, settings):
        return float(mismatch(engine, settings).abs().max())


def test_batch_invariant_kernels_leave_no_difference_at_all(record_property):
    scaled(*BATCH_INVARIANT)  # skips where it cannot be
    most = in_fresh_process(_batch_invariant)
    record_property("mismatch/bf16 batch-invariant/max |dlogp|", most)
    assert most == 0.0


def test_rollouts_repeat():
    """The same weights, prompts and noise give the same completions, to the bit of a log-prob."""
    with engine_of(*te("bf16")) as (engine, settings):
        first, second = (sampled(engine.rollout_network(), settings) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.logprobs, second.logprobs)
