"""The layouts that a model can have on some ranks; `config.rules` decides which are legal."""

import itertools
from collections.abc import Iterator

from agrpo_megatron.config.rules import layout_fits
from agrpo_megatron.config.settings import ModelSettings, ParallelSettings


def layouts(
    model: ModelSettings, *, ranks: int, most_virtual: int = 1, plain_too: bool = False
) -> Iterator[ParallelSettings]:
    """Yield each layout that fits model and ranks.

    Args:
        most_virtual: largest number of virtual stages on a pipeline rank; powers of two are tried.
        plain_too: whether layouts with tensor parallelism are also tried without sequence
            parallelism.
    """
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    of_experts = sizes if model.moe.experts is not None else [1]
    virtual = [1 << power for power in range(most_virtual.bit_length())]
    every = itertools.product(sizes, sizes, sizes, of_experts, (False, True), virtual)
    for tensor, pipeline, context, expert, is_split, chunks in every:
        if tensor * pipeline * context > ranks:
            continue
        if is_split and (tensor == 1 or expert == 1):
            continue
        for sequence in (False, True) if tensor > 1 and plain_too else (tensor > 1,):
            parallel = ParallelSettings(
                tensor=tensor,
                sequence=sequence,
                pipeline=pipeline,
                virtual=chunks,
                context=context,
                expert=expert,
                expert_tensor=tensor if is_split else 1,
            )
            if layout_fits(model, parallel, world_size=ranks):
                yield parallel
