"""Rules of the model's settings alone: heads, their widths, rotary embeddings, and blocks."""

import math
from collections.abc import Sequence

from agrpo_megatron.config.rules.moe import validate_moe
from agrpo_megatron.config.settings import ModelSettings

AUTOREGRESSIVE = ("llama", "qwen2", "qwen3")  # families whose files hold causal models
_PLAIN = ModelSettings()  # of plain rotary embeddings


def validate_model(model: ModelSettings) -> None:
    """Check heads, groups, rotary embeddings and blocks: each has what it needs.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    shares = {"num_query_groups": "num_attention_heads"}
    if model.head_dim is None:
        shares = {"num_attention_heads": "hidden_size", **shares}
    for name, of in shares.items():
        whole = getattr(model, of)
        part = getattr(model, name) or whole
        if whole % part:
            fix = min(divisors(whole), key=lambda divisor: abs(divisor - part))
            raise ValueError(f"model.{name}={part} does not divide model.{of}={whole}; use {fix}")
    _check_head(model)
    _check_rope(model)
    if model.tie_embeddings and model.family not in AUTOREGRESSIVE:
        raise ValueError(
            f"model.tie_embeddings=true: the files of model.family={model.family} have a head of "
            f"its own; use false, or one of {', '.join(AUTOREGRESSIVE)}"
        )
    validate_moe(model)
    attention, length = model.attention, model.block_length
    if model.has_blocks and length is None:
        raise ValueError(
            f"model.attention={attention} needs model.block_length; use for example 4, or "
            "model.attention=full"
        )
    if length is not None and not model.has_blocks:
        raise ValueError(
            f"model.block_length={length} is for attention by blocks, and model.attention="
            f"{attention}; use null, or model.attention=block_causal"
        )


def _check_head(model: ModelSettings) -> None:
    """Refuse an odd width of a head, or of its rotated part, whose numbers turn in pairs."""
    share, width = model.rotary_fraction, model.head_width * model.rotary_fraction
    if model.head_width % 2 == 0 and (width % 2 or width == 0):
        raise ValueError(
            f"model.rotary_fraction={share:g} rotates {width:g} of the {model.head_width} numbers "
            "of a head, and they turn in pairs; use for example 0.5"
        )
    if model.head_width % 2 == 0:
        return
    why, head = "is odd, and rotary embeddings turn pairs", model.head_dim
    if head is not None:
        raise ValueError(f"model.head_dim={head} {why}; use {head + 1}")
    heads = model.num_attention_heads
    raise ValueError(
        f"model.hidden_size={model.hidden_size} / model.num_attention_heads={heads} {why}; use a "
        f"multiple of {2 * heads}"
    )


def _check_rope(model: ModelSettings) -> None:
    """Check that rotary embeddings have what their scaling needs, and nothing besides."""
    factor, beta, length = model.rope_factor, model.query_scale_beta, model.rope_original_length
    if length is None and (factor > 1 or beta > 0):
        name = "rope_factor" if factor > 1 else "query_scale_beta"
        raise ValueError(
            f"model.{name}={getattr(model, name)} needs model.rope_original_length; use the "
            "longest row that the weights were first trained for, such as 16384"
        )
    if length is not None and factor == 1 and beta == 0:
        raise ValueError(
            f"model.rope_original_length={length} is for model.rope_factor and "
            "model.query_scale_beta, and neither is set; use null, or set one of them"
        )
    fast, slow = model.rope_beta_fast, model.rope_beta_slow
    if model.rope_scaling == "llama3" and (factor == 1 or fast == slow):
        why = "model.rope_factor=1" if factor == 1 else "both betas are equal"
        raise ValueError(
            f"model.rope_scaling=llama3 divides slow frequencies by model.rope_factor, with a ramp "
            f"between the betas, and {why}; use yarn, or set them as in rope_scaling of config.json"
        )
    if factor == 1:
        for name, value in (("rope_beta_fast", fast), ("rope_beta_slow", slow)):
            if value != (default := getattr(_PLAIN, name)):
                raise ValueError(
                    f"model.{name}={value} is for YaRN, and model.rope_factor=1; use {default}, or "
                    "set model.rope_factor"
                )
    elif fast < slow:
        raise ValueError(
            f"model.rope_beta_fast={fast} is less than model.rope_beta_slow={slow}; exchange them"
        )
    elif model.rope_theta == 1:
        raise ValueError(
            f"model.rope_theta=1 turns all pairs alike, and model.rope_factor={factor} scales slow "
            "ones; use for example 10000, or model.rope_factor=1"
        )


def divisors(whole: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(whole) + 1) if whole % divisor == 0]
    return sorted({*small, *(whole // divisor for divisor in small)})


def two_nearest(wanted: int, allowed: Sequence[int]) -> str:
    """Return the two allowed values nearest to `wanted`, for the fix of an error."""
    nearest = sorted(allowed, key=lambda value: abs(value - wanted))[:2]
    return " or ".join(map(str, sorted(nearest)))
