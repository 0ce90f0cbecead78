"""Counts of the weights that each rank holds under a layout; exact."""

from dataclasses import dataclass

from agrpo_megatron.config.parallel import layer_matrices, layers_of, padded_vocab
from agrpo_megatron.config.settings import (
    Fp8Settings,
    LoraSettings,
    ModelSettings,
    ParallelSettings,
    Settings,
)
from agrpo_megatron.scaling.adapters import adapter_parameters, stage_adapted


@dataclass(frozen=True)
class WeightSpec:
    """What determines the stored weights under any layout."""

    model: ModelSettings
    vocab_rows: int  # of embedding and head, padding included
    precision: str
    fp8: Fp8Settings
    lora: LoraSettings


def weight_spec(settings: Settings) -> WeightSpec:
    """Return what determines the stored weights."""
    rows = padded_vocab(settings)
    return WeightSpec(settings.model, rows, settings.precision, settings.fp8, settings.lora)


def fp8_parameters(spec: WeightSpec, parallel: ParallelSettings, *, stage: int) -> int:
    """Return how many weights of a rank are multiplied in FP8: the matrices of its layers."""
    if spec.precision != "fp8":
        return 0
    model, fp8 = spec.model, spec.fp8
    in_fp8 = range(fp8.bf16_first_layers, model.num_layers - fp8.bf16_last_layers)
    count = 0
    for number in layers_of(model, parallel, stage=stage):
        if number in in_fp8:
            matrices = layer_matrices(model, number)
            count += sum(matrices.held(parallel)) - matrices.router
    return count


def stage_parameters(
    spec: WeightSpec, parallel: ParallelSettings, *, stage: int
) -> tuple[int, int]:
    """Return the weights of each rank of a pipeline stage: outside the experts, and of them.

    Over all its virtual stages.
    """
    model = spec.model
    layers = [
        layer_parameters(model, parallel, number)
        for number in layers_of(model, parallel, stage=stage)
    ]
    count, experts = map(sum, zip(*layers, strict=True))
    if stage == 0:
        count += table_parameters(spec, parallel)
    if stage == parallel.pipeline - 1:
        count += model.hidden_size  # the norm before the head
        if parallel.pipeline > 1 or not model.tie_embeddings:  # stages have copies of a tied head
            count += table_parameters(spec, parallel)
    return count, experts


def trained_parameters(
    spec: WeightSpec, parallel: ParallelSettings, *, stage: int
) -> tuple[int, int]:
    """Return how many numbers of each rank of a pipeline stage are trained.

    Outside the experts, and of them, as `stage_parameters`.
    """
    lora = spec.lora
    if lora.rank is None:
        return stage_parameters(spec, parallel, stage=stage)
    tables = lora.train_embedding * (stage == 0)
    tables += lora.train_head * (stage == parallel.pipeline - 1)
    adapters, of_experts = count_adapters(spec, parallel, stage=stage)
    return adapters + tables * table_parameters(spec, parallel), of_experts


def count_adapters(spec: WeightSpec, parallel: ParallelSettings, *, stage: int) -> tuple[int, int]:
    """Return the numbers of a rank's adapters: outside the experts, and of them."""
    adapted = stage_adapted(spec.model, spec.lora, parallel, stage=stage)
    sizes = {"parallel": parallel, "vocab_rows": spec.vocab_rows}
    return adapter_parameters(spec.model, adapted, rank=spec.lora.rank, **sizes)


def table_parameters(spec: WeightSpec, parallel: ParallelSettings) -> int:
    """Return the weights of each rank in the embedding, or in the head."""
    return spec.vocab_rows // parallel.tensor * spec.model.hidden_size


def layer_parameters(
    model: ModelSettings, parallel: ParallelSettings, number: int
) -> tuple[int, int]:
    """Return the weights of a layer on each rank: outside the experts, and of them.

    Norms are replicated.
    """
    count, experts = layer_matrices(model, number).held(parallel)
    if model.qkv_bias:
        count += (model.query_width + 2 * model.key_width) // parallel.tensor
    norms = 2 * model.hidden_size + (2 * model.head_width if model.qk_norm else 0)
    return count + norms, experts


def expert_biases(model: ModelSettings, parallel: ParallelSettings, *, stage: int) -> int:
    """Return the biases of experts on each rank of a pipeline stage."""
    if not model.moe.expert_bias:
        return 0
    layers = layers_of(model, parallel, stage=stage)
    return sum(layer_matrices(model, number).experts for number in layers)
