"""Rules of the model's settings alone: heads, their widths, and blocks."""

import math

from agrpo_megatron.config.settings import ModelSettings


def validate_model(model: ModelSettings) -> None:
    """Check that heads and groups divide what they share, and that blocks have a length.

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
    """Refuse an odd width of a head, whose numbers rotary embeddings turn in pairs."""
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


def divisors(whole: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(whole) + 1) if whole % divisor == 0]
    return sorted({*small, *(whole // divisor for divisor in small)})
