"""What the low-rank adapters of a rank hold, and the weights that they are merged into."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from agrpo_megatron.config.parallel import layer_stages
from agrpo_megatron.config.settings import LoraSettings, ModelSettings, ParallelSettings
from agrpo_megatron.families import hf_shapes
from agrpo_megatron.families.lora import HEAD, Linear, adapted_layers, trained_whole
from agrpo_megatron.families.tensors import LAYER


def layer_number(linear: Linear) -> int | None:
    """Return the number of the layer that holds a linear layer; None for the head."""
    found = LAYER.match(linear.mapping.megatron)
    return int(found[1]) if found else None


def stage_adapted(
    model: ModelSettings, lora: LoraSettings, parallel: ParallelSettings, *, stage: int
) -> list[Linear]:
    """Return the linear layers of a pipeline stage that have adapters; the head's is the last."""
    if lora.rank is None:
        return []
    stages = layer_stages(model, parallel)
    numbers = [(layer_number(linear), linear) for linear in adapted_layers(model, lora)]
    last = parallel.pipeline - 1
    return [each for n, each in numbers if (last if n is None else stages[n]) == stage]


def adapter_parameters(
    model: ModelSettings,
    adapted: Sequence[Linear],
    *,
    rank: int | None,
    parallel: ParallelSettings,
    vocab_rows: int,
) -> tuple[int, int]:
    """Return the numbers in the adapters of a rank: outside the experts, and of them.

    Ranks split the matrix on the side that their layer is split on; the other one is whole.

    Args:
        vocab_rows: of the head, padding included.
    """
    counts = []
    for layer in adapted:
        assert rank is not None
        outputs = vocab_rows if layer.is_head else layer.outputs
        split, whole = outputs, layer.inputs
        if layer.is_split_by_inputs:
            split, whole = whole, split
        ranks = parallel.expert_tensor if layer.is_expert else parallel.tensor
        counts.append((layer.mapping.expert, rank * (split // ranks + whole)))
    return _held(model, parallel, counts)


def adapted_weights(
    model: ModelSettings, adapted: Sequence[Linear], *, parallel: ParallelSettings, vocab_rows: int
) -> int:
    """Return the weights of a rank in Megatron's layers that have adapters, of any part."""
    shapes, counts = hf_shapes(model), []
    for mapping in {layer.mapping for layer in adapted}:
        rows = sum(shapes[name][0] for name in mapping.parts)
        rows = vocab_rows if mapping.module == HEAD else rows
        ranks = parallel.tensor if mapping.expert is None else parallel.expert_tensor
        counts.append((mapping.expert, rows * shapes[mapping.parts[0]][1] // ranks))
    return sum(_held(model, parallel, counts))


def _held(
    model: ModelSettings, parallel: ParallelSettings, counts: Iterable[tuple[int | None, int]]
) -> tuple[int, int]:
    """Return what a rank holds of some counts: outside the experts, and of its own.

    Where `lora.modules` names some experts only, it is the rank with the most.

    Args:
        counts: each with the number of its expert, or None.
    """
    each, total, of_ranks = (model.moe.experts or 1) // parallel.expert, 0, Counter[int]()
    for expert, count in counts:
        if expert is None:
            total += count
        else:
            of_ranks[expert // each] += count
    return total, max(of_ranks.values(), default=0)


def adapter_note(model: ModelSettings, lora: LoraSettings) -> str:
    """Return a line on what is trained, of how much."""
    shapes, layers = hf_shapes(model), adapted_layers(model, lora)
    assert model.vocab_size is not None
    alone = {"parallel": ParallelSettings(), "vocab_rows": model.vocab_size}
    trained = sum(adapter_parameters(model, layers, rank=lora.rank, **alone))
    trained += sum(math.prod(shapes[name]) for name in trained_whole(model, lora).values())
    whole = sum(math.prod(shape) for shape in shapes.values())
    return (
        f"adapters of rank {lora.rank} on {len(layers)} layers: {trained / 1e6:.3g}M parameters "
        f"are trained, of a model of {whole / 1e6:.3g}M"
    )
