"""Parallel layouts: written as text, counted in ranks, and split into pipeline stages.

The arithmetic only; `rules` checks which layouts are legal. Imports neither torch nor Megatron.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

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
    split minimises the largest rank, counted in the parameters that it holds, then the largest
    chunk of each rank. With virtual stages it assumes that the first chunk holds all of
    `moe.dense_layers`. The first chunk of the first rank also holds the embedding, the last chunk
    of the last rank the head. The layout was checked by `rules`.
    """
    if parallel.layers is not None:
        return tuple(parallel.layers)
    ranks, chunks = parallel.pipeline, parallel.virtual
    table = (model.vocab_size or 0) * model.hidden_size
    first, last = (_held(model, parallel, number) for number in (0, model.num_layers - 1))
    sizes = (first,) * (model.num_layers - model.moe_layers) + (last,) * model.moe_layers
    held = [[0] * chunks for _ in range(ranks)]  # parameters outside the layers
    held[0][0] += table
    held[-1][-1] += table
    totals = _spread(sizes, tuple(sum(rank) for rank in held), least=chunks)
    ends = list(accumulate(totals))
    split = [
        _spread(sizes[end - total : end], tuple(rank), least=1)
        for end, total, rank in zip(ends, totals, held, strict=True)
    ]
    return tuple(split[rank][chunk] for chunk in range(chunks) for rank in range(ranks))


def layer_stages(model: ModelSettings, parallel: ParallelSettings) -> list[int]:
    """Return the pipeline rank of each layer."""
    chunks = enumerate(stage_layers(model, parallel))
    return [chunk % parallel.pipeline for chunk, layers in chunks for _ in range(layers)]


def layers_of(model: ModelSettings, parallel: ParallelSettings, *, stage: int) -> list[int]:
    """Return the numbers of the layers of a pipeline rank."""
    return [n for n, place in enumerate(layer_stages(model, parallel)) if place == stage]


def attention_cost(model: ModelSettings) -> float:
    """Return the FLOPs of attending to one token, relative to a token's linear FLOPs.

    A row of s tokens costs s + attention_cost * s^2, in units of one token's matrices: per layer
    4 * query_width FLOPs for each pair of tokens (scores and values), 2 for each weight that a
    token uses.
    """
    norms = 2 * model.hidden_size
    used = sum(layer_matrices(model, n).used + norms for n in range(model.num_layers))
    return 2 * model.num_layers * model.query_width / used


@cache
def _spread(sizes: tuple[int, ...], held: tuple[int, ...], *, least: int) -> tuple[int, ...]:
    """Give each place its next layers, so that the largest place is as small as possible.

    Then the second largest is, and so on. On a tie, the first and the last place get fewer layers
    than the others, and an earlier place gets more.

    Args:
        sizes: of the layers in order.
        held: what each place holds outside the layers.
        least: layers of each place.
    """
    starts = (0, *accumulate(sizes))
    # By number of layers given so far: sizes of the places, largest first; layers of the first and
    # the last place; and the layers of each place, negative. The smallest is the best.
    best: dict[int, tuple[tuple[int, ...], int, tuple[int, ...]]] = {0: ((), 0, ())}
    for place, own in enumerate(held):
        is_edge, found = place in (0, len(held) - 1), {}
        last = len(sizes) - least * (len(held) - 1 - place)
        for end in range(least * (place + 1), last + 1):
            found[end] = min(
                (
                    tuple(sorted((*loads, own + starts[end] - starts[begin]), reverse=True)),
                    edges + is_edge * (end - begin),
                    (*counts, begin - end),
                )
                for begin, (loads, edges, counts) in best.items()
                if end - begin >= least
            )
        best = found
    return tuple(-count for count in best[len(sizes)][2])


@dataclass(frozen=True)
class LayerMatrices:
    """The weights of a layer's matrices."""

    split: int  # by `tensor`: query, key, value, output, and a SwiGLU or shared experts
    router: int = 0  # whole on each rank
    expert: int = 0  # of one expert
    experts: int = 0
    topk: int = 0  # experts of a token

    @property
    def used(self) -> int:
        """The weights that a token meets."""
        return self.split + self.router + self.topk * self.expert

    def held(self, parallel: ParallelSettings) -> tuple[int, int]:
        """Return what each rank of a layout holds: outside the experts, and of them."""
        experts = self.experts // parallel.expert * self.expert // parallel.expert_tensor
        return self.split // parallel.tensor + self.router, experts


def layer_matrices(model: ModelSettings, number: int) -> LayerMatrices:
    """Return the weights of the matrices of a layer, by its number from 0."""
    attention = model.hidden_size * (2 * model.query_width + 2 * model.key_width)
    moe, one = model.moe, 3 * model.hidden_size  # for each number of a SwiGLU's hidden layer
    if number >= model.num_layers - model.moe_layers:
        assert moe.experts is not None and moe.ffn_hidden_size is not None
        return LayerMatrices(
            split=attention + one * (moe.shared_ffn_hidden_size or 0),
            router=model.hidden_size * moe.experts,
            expert=one * moe.ffn_hidden_size,
            experts=moe.experts,
            topk=moe.topk,
        )
    return LayerMatrices(split=attention + one * model.ffn_hidden_size)


def _held(model: ModelSettings, parallel: ParallelSettings, number: int) -> int:
    """Return the weights of a layer on each rank, times `tensor`: its matrices and two norms."""
    matrices, tensor = layer_matrices(model, number), parallel.tensor
    _, experts = matrices.held(parallel)
    return matrices.split + tensor * (matrices.router + experts) + 2 * model.hidden_size
