"""The masked-diffusion transformer once more: plain torch, one row at a time, from HF tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings


def literal_logits(
    tensors: dict[str, Tensor], model: ModelSettings, tokens: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Return the logits [T, V] of one row of tokens [T]; `mask` [T, T]: who sees whom."""
    x = tensors["model.transformer.wte.weight"][tokens]
    for layer in range(model.num_layers):
        part = {
            name.removeprefix(f"model.transformer.blocks.{layer}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"model.transformer.blocks.{layer}.")
        }
        normed = _norm(x, part["attn_norm.weight"], model)
        x = x + _attention(normed, part, model, mask) @ part["attn_out.weight"].T
        normed = _norm(x, part["ff_norm.weight"], model)
        gated = F.silu(normed @ part["ff_proj.weight"].T) * (normed @ part["up_proj.weight"].T)
        x = x + gated @ part["ff_out.weight"].T
    x = _norm(x, tensors["model.transformer.ln_f.weight"], model)
    return x @ tensors["model.transformer.ff_out.weight"].T


def _norm(x: Tensor, weight: Tensor, model: ModelSettings) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + model.norm_epsilon).sqrt()


def _attention(
    x: Tensor, part: dict[str, Tensor], model: ModelSettings, mask: Tensor | None
) -> Tensor:
    """Attend from every position to every position of the mask, [T, heads * head]."""
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    heads = {}
    for name in "qkv":
        y = x @ part[f"{name}_proj.weight"].T
        if model.qkv_bias:
            y = y + part[f"{name}_proj.bias"]
        heads[name] = y.view(len(x), -1, head).transpose(0, 1)  # [heads, T, head]
    for name in "qk":
        if model.qk_norm:
            heads[name] = _norm(heads[name], part[f"{name}_norm.weight"], model)
        heads[name] = _rotate(heads[name], model.rope_theta)
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
