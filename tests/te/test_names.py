"""The te spec's parameters are the local spec's: names, shapes, dtypes, sharding, checkpoint keys.

On the meta device, so LLaDA-8B is built in full, without values.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformer_engine.pytorch import RMSNorm

from agrpo_megatron.checkpoint.sharded import _model_state
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.parallel import start_ranks
from tests.ranks import run_ranks
from tests.te import kernels
from tests.te.models import BF16, FP8, LOCAL, SMALL, TE, VARIANTS

SHARDING = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
LLADA_8B = [
    "model.num_layers=32",
    "model.hidden_size=4096",
    "model.ffn_hidden_size=12288",
    "model.num_attention_heads=32",
    "model.vocab_size=126464",
    "model.mask_token_id=126336",
    "model.rope_theta=500000",
]
TINY = [*SMALL, "model.num_layers=2", "model.vocab_size=83", "model.mask_token_id=82"]
MODELS = {name: [*TINY, *overrides] for name, overrides in VARIANTS.items()}
MODELS["LLaDA-8B"] = LLADA_8B


class _MetaForCuda(TorchFunctionMode):
    """Leave weights without values where Transformer Engine allocates GPU memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device")) == "cuda":
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _described_all(layout):
    """Return both specs' descriptions of every model, and of an FP8 model."""
    kernels.install()
    torch.cuda.current_device = lambda: torch.device("meta")
    models = set(MODELS) - ({"experts"} if layout == "parallel=tp2" else set())  # they need sp
    described = {
        (model, spec): _described([*MODELS[model], layout, BF16, spec])
        for model in models
        for spec in (LOCAL, TE)
    }
    return described | {("grouped", FP8): _described([*MODELS["grouped"], layout, FP8])}


def _described(overrides):
    """Describe a network's parameters, its checkpoint and its modules."""
    settings = load(Settings, None, ["run.threads=1", *overrides])
    ranks = start_ranks(settings)
    with _MetaForCuda():
        network = build_network(settings, ranks)
    norms = [m for c in network.chunks for m in c.modules() if isinstance(m, RMSNorm)]
    for norm in norms:  # it does this only once its weight has values
        norm.weight.sequence_parallel = norm.sequence_parallel
    # Megatron makes a router's weights on the CPU.
    matrices = [(name, p) for name, p in network.named_parameters() if p.dim() > 1]
    assert all(p.is_meta for name, p in matrices if "router" not in name)
    parameters = {
        name: {
            "shape": tuple(p.shape),
            "dtype": p.dtype,
            **{attribute: getattr(p, attribute, None) or 0 for attribute in SHARDING},
        }
        for name, p in network.named_parameters()
    }
    stored = {
        (part.key, part.global_offset): (part.global_shape, part.local_shape, part.dtype)
        for state in _model_state(network).values()
        for part in _leaves(state)
    }
    kinds = {type(m).__name__ for chunk in network.chunks for m in chunk.modules()}
    return parameters, stored, kinds


def _leaves(state):
    """Return the sharded tensors; a tensor stored in parts gives several."""
    leaves = []
    for value in state.values():
        built = value.build() if hasattr(value, "build") else value
        leaves += built if isinstance(built, list) else [built]
    return leaves


@pytest.mark.parametrize("layout", ["dp1", "tp2", "tp2-sp", "pp2"])
def test_parameters_and_checkpoints_are_the_local_specs(layout):
    for described in run_ranks(1 if layout == "dp1" else 2, _described_all, f"parallel={layout}"):
        for (model, spec), (parameters, stored, kinds) in described.items():
            expected, keys, _ = described[model, LOCAL]
            assert parameters == expected, (model, spec)
            assert stored == keys and len(stored) >= 8, (model, spec)
            assert ("TELayerNormColumnParallelLinear" in kinds) == (spec != LOCAL)
        if layout == "dp1":
            parameters, _, _ = described["LLaDA-8B", TE]
            total = sum(torch.Size(p["shape"]).numel() for p in parameters.values())
            assert total == 8_015_581_184
