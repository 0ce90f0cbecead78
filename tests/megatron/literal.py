"""The masked-diffusion transformer once more: plain torch, one row at a time, from HF tensors."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings


def literal_logits(
    tensors: dict[str, Tensor],
    model: ModelSettings,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    layer: Callable[[str, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the logits [T, V] of one row of tokens [T]; `mask` [T, T]: who sees whom.

    Args:
        layer: the output of a linear layer or of the embedding, by its name; None: by its tensors.
    """
    layer = layer or partial(_layer, tensors)
    x = layer("model.transformer.wte", tokens)
    for number in range(model.num_layers):
        block = f"model.transformer.blocks.{number}."
        normed = _norm(x, tensors[block + "attn_norm.weight"], model)
        heads = {name: layer(f"{block}{name}_proj", normed) for name in "qkv"}
        norms = {name: tensors.get(f"{block}{name}_norm.weight") for name in "qk"}
        x = x + layer(block + "attn_out", _attention(heads, norms, model, mask))
        normed = _norm(x, tensors[block + "ff_norm.weight"], model)
        gated = F.silu(layer(block + "ff_proj", normed)) * layer(block + "up_proj", normed)
        x = x + layer(block + "ff_out", gated)
    x = _norm(x, tensors["model.transformer.ln_f.weight"], model)
    return layer("model.transformer.ff_out", x)


def _layer(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    return F.linear(x, weight, bias) if x.is_floating_point() else weight[x]


def _norm(x: Tensor, weight: Tensor, model: ModelSettings) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + model.norm_epsilon).sqrt()


def _attention(
    flat: dict[str, Tensor],
    norms: dict[str, Tensor | None],
    model: ModelSettings,
    mask: Tensor | None,
) -> Tensor:
    """Attend from every position to every position of the mask, [T, heads * head]."""
    head, heads = model.head_width, {}
    for name, y in flat.items():
        heads[name] = y.view(len(y), -1, head).transpose(0, 1)  # [heads, T, head]
    for name, norm in norms.items():
        if norm is not None:
            heads[name] = _norm(heads[name], norm, model)
        turned, rest = heads[name].split([model.rotary_width, head - model.rotary_width], -1)
        heads[name] = torch.cat([_rotate(turned, model.rope_theta), rest], -1)
    repeats = model.num_attention_heads // (model.num_query_groups or model.num_attention_heads)
    key, value = (heads[name].repeat_interleave(repeats, dim=0) for name in "kv")
    scores = heads["q"] @ key.transpose(1, 2) / head**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    return (weights @ value).transpose(0, 1).flatten(1)


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Turn pair (i, i + head / 2) of position p by the angle p * theta^(-2 i / head)."""
    half = x.shape[-1] // 2
    turn = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * turn
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
