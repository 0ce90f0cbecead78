"""The cases of golden numbers of routers and experts, and what a model computes there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from golden import below
from torch import Tensor

from agrpo_megatron.diffusion.patterns import block_causal
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.types import Row

LAYER = 2  # of tensors that name none


@dataclass(frozen=True)
class RouterCase:
    """Rows, and what the router and the experts of one layer make of their tokens."""

    name: str
    layer: int
    canvas: Tensor  # [R, L]
    lengths: Tensor  # [R]
    patterns: list[Row] | None
    chosen: Tensor  # [T, experts] bool
    values: dict[str, Tensor]  # [T, ...] each


@dataclass
class Seen:
    """What a layer of experts computed for this rank's tokens."""

    first: int  # token
    count: int
    chosen: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)


def router_cases(tensors: dict[str, Tensor], block: int | None) -> Iterator[RouterCase]:
    """Yield the layers whose routers were recorded, on the rows of the logits.

    Names are router.topk_idx for one layer; router.N.topk_idx for layer N; and of block models
    router.full.topk_idx and router.block.topk_idx for one layer and two patterns.
    """
    found = below(tensors, "router.")
    for key in found:
        *where, name = key.split(".")
        if name != "topk_idx":
            continue
        place = ".".join(where)
        kind = place if place in ("full", "block") else None
        yield _case(
            tensors["logits.input_ids"],
            below(found, f"{place}." if place else ""),
            name=f"router {place}".strip(),
            layer=int(place) if place.isdigit() else LAYER,
            block=None if kind == "full" else block,
            has_blocks=block is not None,
        )


def _case(
    ids: Tensor,
    part: dict[str, Tensor],
    *,
    name: str,
    layer: int,
    block: int | None,
    has_blocks: bool,
) -> RouterCase:
    count, length = ids.shape
    logits, chosen = part["logits"].flatten(0, 1), part["topk_idx"].flatten(0, 1)
    weights = part["topk_weight"].flatten(0, 1)
    values = {
        "input": part["hidden_in"].flatten(0, 1),
        "logits": logits,
        "weights": torch.zeros_like(logits).scatter(1, chosen, weights),
    }
    for key in ("block_out", "moe_block_out"):
        if key in part:
            values["output"] = part[key].flatten(0, 1)
    return RouterCase(
        name,
        layer,
        ids,
        torch.full((count,), length),
        [block_causal(length, block or length)] * count if has_blocks else None,
        torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, value=True),
        values,
    )


@contextmanager
def watched(network: Network) -> Iterator[dict[int, Seen]]:
    """Record what layers of experts compute in a forward pass, by the number of the layer."""
    seen: dict[int, Seen] = {}
    part = network.ranks.tensor if network.config.sequence_parallel else None
    hooks = []

    def watch(layer: Any) -> None:
        """Record what a layer computes."""
        number = layer.layer_number - 1

        def routed(_: Any, given: tuple[Any, ...], made: tuple[Tensor, Tensor]) -> None:
            hidden, count = given[0].flatten(0, 1), len(made[0])
            first = count * part.rank if part else 0
            logits = layer.mlp.router.gating(given[0]).flatten(0, 1)
            values = {"input": hidden, "logits": logits, "weights": made[0]}
            seen[number] = Seen(first, count, made[1], values)

        def ended(_: Any, __: Any, made: tuple[Tensor, Any]) -> None:
            seen[number].values["output"] = made[0].flatten(0, 1).clone()  # a sum overwrites it

        hooks.append(layer.mlp.router.register_forward_hook(routed))
        hooks.append(layer.mlp.register_forward_hook(ended))

    for chunk in network.chunks:
        for layer in chunk.decoder.layers:
            if hasattr(layer.mlp, "router"):
                watch(layer)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def mine(whole: Tensor, seen: Seen) -> Tensor:
    """Return the part of all tokens that this rank has; padding is left out."""
    return whole[seen.first : seen.first + seen.count]


def difference(ours: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number above 1."""
    if not len(expected):
        return 0.0
    gap = (ours[: len(expected)] - expected).abs().max()
    return float(gap / expected.abs().max().clamp(min=1.0))
