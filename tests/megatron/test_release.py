"""Memory of updates is really free during a rollout, and training has the same bits."""

import pytest
import torch

from agrpo_megatron.config.rules.rollouts import validate_release
from agrpo_megatron.rollout import dynamic_sampling
from agrpo_megatron.training.rl import collect_rollout, update_policy
from tests.ranks import run_ranks
from tests.training.tiny import open_session, tiny

PRECISIONS = {
    "fp32": [],
    "fp32, distributed": ["optimizer.distributed=true"],
    "bf16": ["precision=bf16"],
    "bf16, distributed": ["precision=bf16", "optimizer.distributed=true"],
}


def _sizes(engine):
    """Return the bytes of gradients, of moments, of main weights and of weights now."""
    buffers = [buffer for ddp in engine.ddp for buffer in ddp.buffers]
    inner = [part.optimizer for part in engine.optimizers]
    states = [v for each in inner for s in each.state.values() for k, v in s.items() if "exp" in k]
    weights = [p for _, p in engine.network.named_parameters()]
    main = [p for each in inner for group in each.param_groups for p in group["params"]]
    main = [p for p in main if p.dtype != weights[0].dtype]
    groups = [[buffer.grad_data for buffer in buffers], states, main, weights]
    return [{t.untyped_storage().nbytes() for t in tensors} for tensors in groups]


def _trained(overrides, mode):
    """Return what is free within the second rollout, and bits of two iterations."""
    session, engine = open_session(*overrides, f"rollout.release={mode}")
    own, seen = dynamic_sampling.generate, []

    def generate(*args):
        seen.append(_sizes(engine))
        return own(*args)

    dynamic_sampling.generate = generate
    losses = []
    for iteration in range(2):
        rollout, _ = collect_rollout(session, engine, iteration)
        metrics, _ = update_policy(session, engine, rollout, None)
        losses.append((metrics["loss"], metrics["grad_norm"], rollout.trajectory.tokens.tolist()))
    weights = [p.detach().clone() for _, p in engine.network.named_parameters()]
    states = [
        v.clone()
        for part in engine.optimizers
        for state in part.optimizer.state.values()
        for v in state.values()
        if isinstance(v, torch.Tensor)
    ]
    return seen[1], losses, weights + states


def _all_modes(overrides):
    return {mode: _trained(overrides, mode) for mode in ("none", "gradients", "optimizer")}


@pytest.mark.parametrize("name", PRECISIONS)
def test_memory_is_free_in_a_rollout_and_no_bit_changes(name):
    (found,) = run_ranks(1, _all_modes, PRECISIONS[name])
    _, expected, bits = found["none"]
    for mode, (sizes, losses, ours) in found.items():
        gradients, moments, main, weights = sizes
        assert (gradients == {0}) == (mode != "none")
        assert (moments == {0}) == (mode == "optimizer")
        assert not main or (main == {0}) == (mode == "optimizer")
        assert bool(main) == name.startswith("bf16") and 0 not in weights
        assert losses == expected
        assert len(ours) == len(bits) and all(map(torch.equal, ours, bits))


REFUSED = {
    "optimizer.offload=0.5": "use rollout.release=gradients",
    "optimizer.moments=fp8": "use rollout.release=gradients",
    "ddp.nccl_ub=true": "use ddp.nccl_ub=false",
    "fp8={recipe: mxfp8, primary_weights: true}": "use rollout.release=none",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_released_is_refused(override):
    validate_release(tiny("rollout.release=optimizer"))
    with pytest.raises(ValueError, match=r"^rollout\.release=optimizer ") as caught:
        validate_release(tiny("rollout.release=optimizer", override))
    assert REFUSED[override] in str(caught.value)
