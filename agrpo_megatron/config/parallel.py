"""Parallel layouts: written as text, counted in ranks, and split into pipeline stages.

The arithmetic only; `rules` checks which layouts are legal. Imports neither torch nor Megatron.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from agrpo_megatron.config.settings import ModelSettings, ParallelSettings, Settings


def layout_name(parallel: ParallelSettings, world_size: int) -> str:
    """Return the layout's canonical text, without `layers`."""
    return layout_text(replace(parallel, data=data_ranks(parallel, world_size)))


def layout_text(parallel: ParallelSettings) -> str:
    """Return the layout as text, with dp only where `data` is fixed."""
    parts = (
        f"tp{parallel.tensor}",
        "sp" if parallel.sequence else "",
        f"pp{parallel.pipeline}",
        f"vpp{parallel.virtual}" if parallel.virtual > 1 else "",
        f"cp{parallel.context}",
        f"ep{parallel.expert}" if parallel.expert > 1 else "",
        f"etp{parallel.expert_tensor}" if parallel.expert_tensor > 1 else "",
        f"dp{parallel.data}" if parallel.data is not None else "",
    )
    return "-".join(part for part in parts if part)


def model_ranks(parallel: ParallelSettings) -> int:
    """Return how many ranks share one copy of the model."""
    return parallel.tensor * parallel.pipeline * parallel.context


def data_ranks(parallel: ParallelSettings, world_size: int) -> int:
    """Return how many copies of the model the ranks hold; the layout was checked by `rules`."""
    return parallel.data or world_size // model_ranks(parallel)


def padded_vocab(settings: Settings) -> int:
    """Return the embedding's rows: padded only as far as a tensor-parallel split needs."""
    assert settings.model.vocab_size is not None
    multiple = math.lcm(settings.parallel.tensor, settings.rollout_layout.tensor)
    return -(-settings.model.vocab_size // multiple) * multiple


def stage_layers(model: ModelSettings, parallel: ParallelSettings) -> tuple[int, ...]:
    """Return the layers of each virtual stage in order, as Megatron counts them.

    Entry v * pipeline + i is chunk v of pipeline rank i. Without `parallel.layers`, the
    split minimises the largest rank, counted in parameters, then the largest chunk of each rank.
    The first chunk of the first rank also holds the embedding, the last chunk of the last rank the
    head. The layout was checked by `rules`.
    """
    if parallel.layers is not None:
        return tuple(parallel.layers)
    ranks, chunks = parallel.pipeline, parallel.virtual
    layer, table = _layer_parameters(model), (model.vocab_size or 0) * model.hidden_size
    held = [[0] * chunks for _ in range(ranks)]  # parameters outside the layers
    held[0][0] += table
    held[-1][-1] += table
    totals = _spread(model.num_layers, [sum(rank) for rank in held], layer=layer, least=chunks)
    split = [
        _spread(total, rank, layer=layer, least=1) for total, rank in zip(totals, held, strict=True)
    ]
    return tuple(split[rank][chunk] for chunk in range(chunks) for rank in range(ranks))


def layer_stages(model: ModelSettings, parallel: ParallelSettings) -> list[int]:
    """Return the pipeline rank of each layer."""
    chunks = enumerate(stage_layers(model, parallel))
    return [chunk % parallel.pipeline for chunk, layers in chunks for _ in range(layers)]


def attention_cost(model: ModelSettings) -> float:
    """Return the FLOPs of attending to one token, relative to a token's linear FLOPs.

    A row of s tokens costs s + attention_cost * s^2, in units of one token's matrices: per layer
    4 * query_width FLOPs for each pair of tokens (scores and values), 2 for each weight and token.
    """
    return 2 * model.query_width / _layer_parameters(model)


def _spread(count: int, held: Sequence[int], *, layer: int, least: int) -> list[int]:
    """Give each layer to the cheapest place, which minimises the largest place.

    On a tie, the first and last place come after the others, and an earlier place comes first.
    """
    layers = [least] * len(held)

    def cost(place: int) -> tuple[int, bool, int]:
        is_edge = place in (0, len(held) - 1)
        return held[place] + layer * layers[place], is_edge, place

    for _ in range(count - sum(layers)):
        layers[min(range(len(held)), key=cost)] += 1
    return layers


def layer_matrices(model: ModelSettings) -> int:
    """Return the weights of a layer's matrices: query, key, value and output, and SwiGLU's."""
    attention = 2 * model.query_width + 2 * model.key_width
    return model.hidden_size * (attention + 3 * model.ffn_hidden_size)


def _layer_parameters(model: ModelSettings) -> int:
    """Return a layer's weights: its matrices and two norms."""
    return layer_matrices(model) + 2 * model.hidden_size
