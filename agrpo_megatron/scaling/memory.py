"""Bytes that each rank holds under a layout; exact for weights, gradients and optimizer states.

Activations are estimates, see `_activations`. Workspaces, communication buffers and what the
allocator wastes come on top: leave a tenth of the GPU free for them.
"""

from dataclasses import dataclass, fields

from agrpo_megatron.layout import data_ranks, padded_vocab, rollout_parallel, stage_layers
from agrpo_megatron.settings import ModelSettings, ParallelSettings, Settings

SPARE = 0.9  # of a GPU's memory: what arithmetic does not see needs the rest
FLOAT32, MOMENTS = 4, 8  # bytes of a number, and of Adam's two moments of a weight


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds at the peak of an update."""

    weights: int = 0
    gradients: int = 0  # float32, as accumulated
    main_weights: int = 0  # the optimizer's float32 copies, where the weights are bf16
    moments: int = 0
    rollout_copy: int = 0  # a second set of weights, where rollouts have a layout of their own
    activations: int = 0

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(getattr(self, part) for part in PARTS)


PARTS = tuple(part.name for part in fields(Memory))


def worst_rank(settings: Settings, world_size: int) -> Memory:
    """Return what the pipeline stage that needs most holds; the layout was checked by `rules`."""
    stages = range(settings.parallel.pipeline)
    return max((rank_memory(settings, world_size, stage=s) for s in stages), key=lambda m: m.total)


def rank_memory(settings: Settings, world_size: int, *, stage: int) -> Memory:
    """Return what a rank of a pipeline stage holds; the layout was checked by `rules`."""
    parallel, model = settings.parallel, settings.model
    count = stage_parameters(settings, parallel, stage=stage)
    width = 2 if settings.precision == "bf16" else FLOAT32
    replicas = data_ranks(parallel, world_size) * parallel.context
    share = replicas if settings.optimizer.distributed else 1
    rollout, copy = rollout_parallel(settings), 0
    if rollout != parallel:
        copies = (stage_parameters(settings, rollout, stage=s) for s in range(rollout.pipeline))
        copy = max(copies) * width
    return Memory(
        weights=count * width,
        gradients=count * FLOAT32,
        main_weights=-(-count // share) * FLOAT32 if settings.precision == "bf16" else 0,
        moments=-(-count // share) * MOMENTS,
        rollout_copy=copy,
        activations=_activations(settings, model, parallel, stage=stage) * width,
    )


def stage_parameters(settings: Settings, parallel: ParallelSettings, *, stage: int) -> int:
    """Return the weights that each rank of a pipeline stage holds, all virtual stages together."""
    model, stages = settings.model, parallel.pipeline
    layers = sum(stage_layers(model, parallel)[stage::stages])
    count = layers * layer_parameters(model, parallel.tensor)
    table = padded_vocab(settings) // parallel.tensor * model.hidden_size
    if stage == 0:
        count += table
    if stage == stages - 1:
        count += table + model.hidden_size  # the head, and the norm before it
    return count


def layer_parameters(model: ModelSettings, tensor: int) -> int:
    """Return the weights of one layer on each tensor-parallel rank; norms are on all of them."""
    width, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    keys = head * (model.num_query_groups or model.num_attention_heads)
    split = width * (2 * width + 2 * keys + 3 * model.ffn_hidden_size)
    if model.qkv_bias:
        split += width + 2 * keys
    return split // tensor + 2 * width + (2 * head if model.qk_norm else 0)


def _activations(
    settings: Settings, model: ModelSettings, parallel: ParallelSettings, *, stage: int
) -> int:
    """Estimate the numbers kept for the backward pass, and those of the head.

    Per token and layer: the residual stream and the two normalised inputs (split only by sequence
    parallelism), and, split by tensor parallelism, queries, keys, values before and after the
    rotation, the attention's output, gate, up, and their product. Full recomputation keeps the
    residual stream alone, and one layer. A stage of a pipeline holds as many micro-batches as
    stages follow it. The head sees the tokens that a denoising step fixes, three times in float32.
    """
    tokens = settings.train.token_budget // parallel.context
    width, head = model.hidden_size, model.hidden_size // model.num_attention_heads
    keys = head * (model.num_query_groups or model.num_attention_heads)
    whole = 4 * width // (parallel.tensor if parallel.sequence else 1)
    split = (2 * (width + 2 * keys) + 2 * width + 4 * model.ffn_hidden_size) // parallel.tensor
    layers = sum(stage_layers(model, parallel)[stage :: parallel.pipeline])
    flying = parallel.pipeline - stage
    if model.megatron.get("recompute_granularity") == "full":
        kept = layers * flying * whole // 4 + whole + split
    else:
        kept = layers * flying * (whole + split)
    total = tokens * kept
    if stage == parallel.pipeline - 1:
        sampling = settings.sampling
        share = sampling.completion_length / sampling.denoising_steps / _row(settings)
        scored = int(tokens * min(1.0, share))
        total += 3 * scored * padded_vocab(settings) // parallel.tensor
    return total


def _row(settings: Settings) -> int:
    """Return the tokens of a row; the prompt is taken to be as long as the completion."""
    return 2 * settings.sampling.completion_length
