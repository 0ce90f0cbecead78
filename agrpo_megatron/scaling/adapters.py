"""What the low-rank adapters of a rank hold, and the weights that they are merged into."""

from collections.abc import Sequence

from agrpo_megatron.config.parallel import layer_stages
from agrpo_megatron.config.settings import LoraSettings, ModelSettings, ParallelSettings
from agrpo_megatron.families import hf_shapes
from agrpo_megatron.families.lora import Linear, adapted_layers
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
    adapted: Sequence[Linear], rank: int | None, *, tensor: int, vocab_rows: int
) -> int:
    """Return the numbers in the adapters of each tensor-parallel rank.

    Ranks split the matrix on the side that their layer is split on; the other one is whole.

    Args:
        vocab_rows: of the head, padding included.
    """
    total = 0
    for layer in adapted:
        assert rank is not None
        outputs = vocab_rows if layer.is_head else layer.outputs
        split, whole = outputs, layer.inputs
        if layer.is_split_by_inputs:
            split, whole = whole, split
        total += rank * (split // tensor + whole)
    return total


def adapted_weights(
    model: ModelSettings, adapted: Sequence[Linear], *, tensor: int, vocab_rows: int
) -> int:
    """Return the weights of each rank in Megatron's layers that have adapters, of any part."""
    shapes, total = hf_shapes(model), 0
    for mapping in {layer.mapping for layer in adapted}:
        rows = sum(shapes[name][0] for name in mapping.parts)
        is_head = any(layer.is_head for layer in adapted if layer.mapping == mapping)
        total += (vocab_rows if is_head else rows) * shapes[mapping.parts[0]][1] // tensor
    return total
