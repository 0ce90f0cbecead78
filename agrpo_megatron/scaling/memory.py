"""Bytes that each rank holds under a layout; exact for weights, gradients and optimizer states.

Activations are estimates, see `scaling.activations`. Workspaces, communication buffers and
fragments of the allocator come on top: leave a tenth of the GPU free for them.
"""

from dataclasses import dataclass, fields

from agrpo_megatron.config.parallel import data_ranks, layer_stages, stage_layers
from agrpo_megatron.config.settings import (
    Fp8Settings,
    OptimizerSettings,
    ParallelSettings,
    Settings,
)
from agrpo_megatron.scaling.activations import kept_bytes, kernels_of, scored_share
from agrpo_megatron.scaling.adapters import adapted_weights, stage_adapted
from agrpo_megatron.scaling.parameters import (
    WeightSpec,
    count_adapters,
    expert_biases,
    fp8_parameters,
    stage_parameters,
    trained_parameters,
    weight_spec,
)

SPARE = 0.9  # usable share of a GPU's memory; the rest is for uncounted buffers
FLOAT32, BFLOAT16 = 4, 2  # bytes of a number
# Bytes of Adam's two moments per weight, as `megatron.engine` configures them. Transformer Engine
# stores an FP8 moment with its transpose, as Hopper's products need; nothing here reads it.
MOMENTS = {"fp32": FLOAT32 + FLOAT32, "bf16": BFLOAT16 + BFLOAT16, "fp8": 1 + 1 + BFLOAT16}


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds at the peak of an update or rollout; all but `host` on the GPU."""

    weights: int = 0
    fp8_copies: int = 0  # of bf16 weights, kept from the first micro-batch on
    gradients: int = 0  # accumulated
    main_weights: int = 0  # the optimizer's float32 copies of bf16 or FP8 weights
    moments: int = 0
    rollout_copy: int = 0  # a second set of weights, if rollouts have a separate layout
    reference: int = 0  # the frozen policy's weights; with adapters it is the model without them
    activations: int = 0  # of the layers; recomputed ones as far as logits leave no room
    logits: int = 0
    rollout_cache: int = 0  # keys and values of a rollout, beyond what updates leave free then
    unmerged: int = 0  # weights before `lora.merge_rollouts`, beyond the room that is left then
    # Moved off the GPU by `optimizer.offload` or `rollout.release`; records of `rollout_experts`.
    host: int = 0

    @property
    def total(self) -> int:
        """Return the sum of all parts on the GPU."""
        return sum(getattr(self, part) for part in PARTS)


PARTS = tuple(part.name for part in fields(Memory) if part.name != "host")


def worst_rank(settings: Settings, world_size: int) -> Memory:
    """Return the memory of the most loaded pipeline stage; `rules` has checked the layout."""
    found = (rank_memory(settings, world_size, stage=s) for s in _stages(settings))
    return max(found, key=lambda m: m.total)


def _stages(settings: Settings) -> list[int]:
    """Return stages of which one is the most loaded.

    A stage between the first and the last holds more than a later one with as many layers of each
    kind, since more micro-batches are in flight. With adapters and FP8 layers are of more kinds.
    """
    model, last = settings.model, settings.parallel.pipeline - 1
    if settings.lora.rank is not None or settings.precision == "fp8":
        return list(range(last + 1))
    places, dense = layer_stages(model, settings.parallel), model.num_layers - model.moe_layers
    kinds: dict[tuple[int, int], int] = {}
    for stage in range(1, last):
        kinds.setdefault((places[:dense].count(stage), places[dense:].count(stage)), stage)
    return sorted({0, last, *kinds.values()})


def rank_memory(settings: Settings, world_size: int, *, stage: int) -> Memory:
    """Return the memory of a rank of a pipeline stage; `rules` has checked the layout."""
    parallel, optimizer = settings.parallel, settings.optimizer
    is_float32 = settings.precision == "fp32"
    spec = weight_spec(settings)
    trained = trained_parameters(spec, parallel, stage=stage)
    weights, copies = _weights(spec, parallel, stage=stage)
    activations, logits = _activations(settings, spec, stage=stage)
    replicas = _replicas(parallel, world_size) if optimizer.distributed else (1, 1)
    own = sum(-(-count // ranks) for count, ranks in zip(trained, replicas, strict=True))
    moved = round(optimizer.offload * own)
    is_short = not is_float32 and optimizer.main_gradients == "bf16"
    needs_reference = settings.algorithm.needs_reference or settings.sft.needs_reference
    gradients = sum(trained) * (BFLOAT16 if is_short else FLOAT32)
    main_weights = 0 if is_float32 else (own - moved) * _main_width(settings.fp8, optimizer)
    moments = (own - moved) * MOMENTS[optimizer.moments]
    away = main_weights + moments if settings.rollout.release == "optimizer" else 0
    cache, has_reference = 0, needs_reference and settings.lora.rank is None
    if settings.caches_keys(settings.sampling):
        cache = int(settings.rollout.cache_memory * 2**30)
    # An update's, which a rollout can use.
    room = activations + logits + away
    room += gradients if settings.rollout.release != "none" else 0
    return Memory(
        weights=weights,
        fp8_copies=copies,
        gradients=gradients,
        main_weights=main_weights,
        moments=moments,
        rollout_copy=_rollout_copy(spec, parallel, settings.rollout_layout),
        reference=_without_backward(weights, copies) if has_reference else 0,
        activations=activations,
        logits=logits,
        rollout_cache=max(0, cache - room),
        unmerged=_unmerged(settings, spec, stage=stage, room=max(0, room - cache)),
        # Main weights, their gradients and both moments, all in float32.
        host=moved * 4 * FLOAT32 + away + _expert_records(settings, world_size),
    )


def _activations(settings: Settings, spec: WeightSpec, *, stage: int) -> tuple[int, int]:
    """Return the bytes of a rank's forward and backward pass: of layers, and of logits."""
    tokens, kernels = settings.train.token_budget // settings.parallel.context, kernels_of(settings)
    return kept_bytes(
        spec.model,
        spec.lora,
        settings.parallel,
        kernels,
        tokens=tokens,
        scored=int(tokens * scored_share(settings.sft, settings.sampling)),
        vocab_rows=spec.vocab_rows,
        stage=stage,
    )


def _expert_records(settings: Settings, world_size: int) -> int:
    """Return the bytes of the experts that a rank records in a rollout, at most.

    One for each expert that a layer chooses for a token (four above 256 experts), in each step;
    in a block model only for the open block, and once for the whole row.
    """
    model, sampling, algorithm = settings.model, settings.sampling, settings.algorithm
    if algorithm.rollout_experts is None:
        return 0
    layout, length = settings.rollout_layout, sampling.completion_length
    row = length + (settings.task.prompt_tokens or model.max_sequence_length - length)
    steps = sampling.most_steps
    tokens = row + steps * sampling.block_length if model.has_blocks else steps * row
    layers = -(-model.moe_layers // layout.pipeline)
    groups = algorithm.prompts_per_iteration * (1 + algorithm.resample_rounds)
    rows = -(-groups * algorithm.group_size // data_ranks(layout, world_size))
    width = 1 if (model.moe.experts or 0) <= 256 else 4
    return rows * tokens * layers * model.moe.topk * width


def row_bytes(settings: Settings, parallel: ParallelSettings, length: int) -> int:
    """Return the bytes of the keys and values of a row, on the rank with the most layers."""
    model, layers = settings.model, stage_layers(settings.model, parallel)
    most = max(sum(layers[stage :: parallel.pipeline]) for stage in range(parallel.pipeline))
    numbers = 2 * most * length * model.key_width // parallel.tensor
    return numbers * (FLOAT32 if settings.precision == "fp32" else BFLOAT16)


def _main_width(fp8: Fp8Settings, optimizer: OptimizerSettings) -> int:
    """Return the bytes of a main weight.

    If moments or gradients are not float32, Transformer Engine's Adam keeps main weights itself, as
    the 16 bits that the bf16 weight lacks; not for weights in FP8, nor with offloading.
    Source: `store_param_remainders` of its FusedAdam.
    """
    is_plain = (optimizer.moments, optimizer.main_gradients) == ("fp32", "fp32")
    is_whole = is_plain or optimizer.offload > 0 or fp8.primary_weights
    return FLOAT32 if is_whole else BFLOAT16


def _replicas(parallel: ParallelSettings, world_size: int) -> tuple[int, int]:
    """Return how many ranks hold the same weights, and the same experts.

    Source: expert_data_parallel_size of Megatron-Core's `parallel_state`.
    """
    of_experts = parallel.pipeline * parallel.expert * parallel.expert_tensor
    return data_ranks(parallel, world_size) * parallel.context, world_size // of_experts


def _weights(spec: WeightSpec, parallel: ParallelSettings, *, stage: int) -> tuple[int, int]:
    """Return the bytes of a rank's weights, and of their FP8 copies.

    An FP8 weight is stored twice: row-wise for the outputs, column-wise for the gradient of the
    inputs. The first micro-batch makes the copies and Transformer Engine keeps them
    (`TransformerEngineBaseModule.quantize_weight`); FP8 primary weights (`fp8.primary_weights`)
    have no copies. Adapters and routers are never in FP8. Biases of experts, which are buffers,
    stay in float32.
    """
    count = sum(stage_parameters(spec, parallel, stage=stage))
    count += sum(count_adapters(spec, parallel, stage=stage))
    biases = FLOAT32 * expert_biases(spec.model, parallel, stage=stage)
    if spec.precision == "fp32":
        return count * FLOAT32 + biases, 0
    in_fp8 = fp8_parameters(spec, parallel, stage=stage)
    both = 2 * (in_fp8 + _scales(spec.fp8.recipe, in_fp8))
    if spec.fp8.primary_weights:
        return (count - in_fp8) * BFLOAT16 + both + biases, 0
    return count * BFLOAT16 + biases, both


def _scales(recipe: str | None, count: int) -> int:
    """Return the bytes of the scales of FP8 weights in one direction.

    One byte for 32 weights (mxfp8), or one float32 for a block of 128 x 128 (blockwise); other
    recipes have one for each tensor.
    """
    return count // 32 if recipe == "mxfp8" else count * FLOAT32 // 128**2


def _rollout_copy(spec: WeightSpec, training: ParallelSettings, rollout: ParallelSettings) -> int:
    """Return the bytes of the weights of a rollout layout, on its most loaded stage."""
    if rollout == training:
        return 0
    found = (_weights(spec, rollout, stage=stage) for stage in range(rollout.pipeline))
    return max(_without_backward(weights, copies) for weights, copies in found)


def _without_backward(weights: int, copies: int) -> int:
    """Return the bytes of weights that take no gradient: FP8 copies in one direction of the two."""
    return weights + copies // 2


def _unmerged(settings: Settings, spec: WeightSpec, *, stage: int, room: int) -> int:
    """Return the bytes of weights that are kept while adapters are merged into them.

    Updates need the weights as they were, so these use the room that activations leave in a
    rollout. A separate rollout layout stays merged in updates, and has no room.
    """
    if not spec.lora.merge_rollouts:
        return 0
    rollout = settings.rollout_layout
    is_own = rollout == settings.parallel
    width = FLOAT32 if spec.precision == "fp32" else BFLOAT16
    sizes = {"parallel": rollout, "vocab_rows": spec.vocab_rows}
    stages = [stage] if is_own else range(rollout.pipeline)
    found = [stage_adapted(spec.model, spec.lora, rollout, stage=each) for each in stages]
    kept = width * max(adapted_weights(spec.model, adapted, **sizes) for adapted in found)
    return max(0, kept - room) if is_own else kept
