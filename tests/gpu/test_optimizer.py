"""Every optimizer there is makes the steps of AdamW, as far as its states allow."""

import pytest
import torch

from tests.gpu.common import REHEARSES, engine_of, local, te, update, weights_of

pytestmark = pytest.mark.gpu

UPDATES, RATE, DECAY, CLIP = 4, 1e-3, 0.1, 1.0
BETAS, EPSILON = (0.9, 0.99), 1e-8
SETTINGS = [
    f"optimizer.learning_rate={RATE}",
    f"optimizer.weight_decay={DECAY}",
    f"optimizer.clip_grad={CLIP}",
    f"optimizer.adam_beta1={BETAS[0]}",
    f"optimizer.adam_beta2={BETAS[1]}",
]
DISTRIBUTED = "optimizer.distributed=true"
# Settings, and how much of the way that weights went may differ.
CASES = {
    "local fp32": (local("fp32"), 1e-4),
    "local bf16": (local("bf16"), 0.01),
    "te bf16": (te("bf16"), 0.01),
    "te bf16 distributed": (te("bf16", DISTRIBUTED), 0.01),
    "gradients bf16": (te("bf16", DISTRIBUTED, "optimizer.main_gradients=bf16"), 0.02),
    "moments bf16": (te("bf16", DISTRIBUTED, "optimizer.moments=bf16"), 0.02),
    "moments fp8": (te("bf16", DISTRIBUTED, "optimizer.moments=fp8"), 0.15),
    "offloaded": (te("bf16", DISTRIBUTED, "optimizer.offload=1.0"), 0.01),
    "half offloaded": (te("bf16", DISTRIBUTED, "optimizer.offload=0.5"), 0.01),
}


def _train(overrides):
    """Return weights before and after, and the gradients of every update."""
    gradients = []
    with engine_of(*overrides, *SETTINGS) as (engine, settings):
        before = weights_of(engine.network)
        own = engine.optimizer.step

        def step():
            named = engine.network.named_parameters()
            gradients.append({name: p.main_grad.float().clone() for name, p in named})
            return own()

        engine.optimizer.step = step
        for seed in range(UPDATES):
            update(engine, settings, seed=seed)
        del engine.optimizer.step
        after = weights_of(engine.network)
        dtypes = {name: p.dtype for name, p in engine.network.named_parameters()}
    return before, after, gradients, dtypes


def _by_hand(before, gradients):
    """Return the float32 weights after torch's AdamW took these gradients, clipped together."""
    weights = {name: w.clone().requires_grad_() for name, w in before.items()}
    decayed = [w for w in weights.values() if w.dim() > 1]
    others = [w for w in weights.values() if w.dim() == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    for named in gradients:
        norm = torch.stack([g.norm() for g in named.values()]).norm()
        share = min(1.0, CLIP / (float(norm) + 1e-6))
        for name, weight in weights.items():
            weight.grad = named[name] * share
        adam.step()
    return {name: w.detach() for name, w in weights.items()}


@pytest.mark.parametrize(("overrides", "bound"), CASES.values(), ids=CASES)
def test_updates_are_those_of_adamw(overrides, bound):
    if REHEARSES and any("offload" in said for said in overrides):
        pytest.skip("offloading copies to pinned memory, which needs a driver")
    before, after, gradients, dtypes = _train(overrides)
    expected = _by_hand(before, gradients)
    assert len(gradients) == UPDATES
    for name, weight in expected.items():
        # What the weights hold is the main weight, rounded.
        rounding = weight.abs() * (2.0**-8 if dtypes[name] == torch.bfloat16 else 2.0**-22)
        beyond = ((after[name] - weight).abs() - rounding).clamp(min=0)
        way = float((weight - before[name]).norm())
        assert way > 0, name
        assert float(beyond.norm()) <= bound * way, name
