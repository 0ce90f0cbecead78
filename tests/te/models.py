"""Models that both layer specs build under the stand-ins, and their comparison."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.weights import export_hf, load_named
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.training.sft import run_sft
from agrpo_megatron.types import PackedRows
from tests.megatron.lora.whole import random_adapters, whole_adapters
from tests.te import kernels
from tests.te.kernels import MXFP8 as MXFP8
from tests.training.tiny import open_session

# Heads of 8, the smallest for fused attention; weights of the usual size for this width, so that
# rounding is not amplified from layer to layer.
SMALL = [
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.init_std=0.1",
    "sft.iterations=1",
    "train.token_budget=45",  # three rows to a micro-batch, and two
]
VARIANTS = {
    "grouped": [],
    "llada": ["model.num_query_groups=null"],
    "bias and qk-norm": ["model.qkv_bias=true", "model.qk_norm=true"],
    "scaled positions": [
        "model.rope_factor=4",
        "model.rope_original_length=4",
        "model.rope_attention_factor=1.1",
        "model.query_scale_beta=0.5",
    ],
    "wide heads": ["model.head_dim=16"],
    "experts": [
        *("model.family=llada_moe", "model.qk_norm=true", "model.rotary_fraction=0.5"),
        "model.moe={experts: 4, topk: 2, ffn_hidden_size: 32, dense_layers: 1, normalise: false}",
        "model.moe.shared_ffn_hidden_size=32",
    ],
}
# A tied head, and a step in which tokens see half of those after them.
ANNEALED = ["model.family=qwen2", "model.tie_embeddings=true", "model.qkv_bias=true"]
ANNEALED += ["kernels.block_attention=sdpa"]  # FlexAttention has no gradient on a CPU
ANNEALED += ["model.shift=true", "sft.iterations=5", "sft.anneal_iterations=4"]
ADAPTERS = ["model.qkv_bias=true", "lora.rank=4", "lora.alpha=8"]
LOCAL, TE = "kernels.layer_spec=local", "kernels.layer_spec=te"
BF16, FP8 = "precision=bf16", "precision=fp8"
TENSORWISE = "fp8.recipe=tensorwise"
DELAYED = ("fp8.recipe=delayed", "train.iterations=0")
LENGTHS = (7, 7, 3, 11, 1)


def opened(
    *overrides: str, weights: Path | None = None, world_size: int = 1, phase: str = "sft"
) -> tuple[Session, Engine]:
    """Return a session and an engine under the stand-ins, with weights that `save` wrote."""
    kernels.install(overrides)
    session, engine = open_session(*SMALL, *overrides, world_size=world_size, phase=phase)
    if weights is not None:
        saved = torch.load(weights)
        load_named(engine.network, session.run.settings.model, saved.__getitem__)
    if engine.network.adapters is not None:
        random_adapters(engine.network, scale=0.1, of=torch.Tensor.bfloat16)
    engine.optimizer.reload_model_params()
    return session, engine


def disturb(network: Network) -> None:
    """Randomise biases and norms, and round every weight to bfloat16; mutates."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("router.weight"):
                parameter.mul_(20)  # else rounding would choose other experts for many tokens
            parameter.copy_(parameter.bfloat16())


def save(path: Path, session: Session, engine: Engine) -> None:
    """Write the weights of all ranks."""
    torch.save(whole_weights(session, engine), path)


def whole_weights(session: Session, engine: Engine) -> dict[str, Tensor]:
    """Return the weights of all ranks, by Hugging Face names."""
    named = {name: p.detach() for name, p in engine.network.named_parameters()}
    return export_hf(named, session.run.settings.model, session.run.ranks)


def sft_gradient(session: Session, engine: Engine) -> tuple[float, dict[str, Tensor]]:
    """Return loss and whole gradient of a supervised step that changes no weight.

    It is the first, or the one in which tokens see half of those after them.
    """
    run, place = session.run, session.run.settings.sft.anneal_iterations // 2
    sft = replace(run.settings.sft, iterations=place + 1)
    session = replace(session, run=replace(run, settings=replace(run.settings, sft=sft)))
    caught: dict[str, Tensor] = {}

    def step() -> tuple[bool, float, None]:
        named = {n: p.main_grad.clone() for n, p in engine.network.trained_parameters()}
        if engine.network.adapters is not None:
            caught.update(whole_adapters(engine.network, lambda p: p.main_grad.clone()))
        else:
            caught.update(export_hf(named, session.run.settings.model, session.run.ranks))
        return True, 0.0, None

    engine.optimizer.step = step  # type: ignore[method-assign]
    run_sft(session, engine, start=place, on_iteration_end=lambda _: None)
    del engine.optimizer.step
    return session.output.log.records[-1]["loss"], caught


def random_rows(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Return rows of tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 80, (length,), generator=generator) for length in lengths]


def pack(rows: list[Tensor]) -> PackedRows:
    """Return rows as one pack with every token scored."""
    bounds = torch.tensor([0] + [len(row) for row in rows]).cumsum(0).to(torch.int32)
    return PackedRows(torch.cat(rows), bounds, torch.arange(int(bounds[-1])))


def logits(network: Network, rows: list[Tensor]) -> Tensor:
    """Return the logits of all tokens, in one pack."""
    network.set_training("eval")
    network.renew_casts()
    with torch.no_grad():
        return network.chunks[0](pack(rows)).float()


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the difference of each tensor, relative to its norm."""
    return {name: distance(ours[name], tensor) for name, tensor in exact.items()}


def distance(ours: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, relative to that of the exact one."""
    return float((ours.float() - exact.float()).norm() / exact.float().norm())
