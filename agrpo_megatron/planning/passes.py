"""Forward and backward passes of one rank: how many, of how many tokens, and their seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from agrpo_megatron.config.parallel import data_ranks, layer_matrices, stage_layers
from agrpo_megatron.config.settings import ModelSettings, ParallelSettings, Settings
from agrpo_megatron.planning.batches import Batches, rollout_batches
from agrpo_megatron.planning.cluster import Cluster
from agrpo_megatron.planning.exchange import exchange
from agrpo_megatron.planning.fit import Work
from agrpo_megatron.scaling.activations import recomputes
from agrpo_megatron.scaling.forecast.work import Flops
from agrpo_megatron.scaling.memory import row_bytes

TILE = 128  # rows of a GPU's tile: a product whose smallest size is n reaches n / (n + TILE)


@dataclass(frozen=True)
class Pass:
    """A forward pass of a pipeline stage on one rank, or a forward and a backward pass."""

    tokens: float  # of one replica
    narrowest: float  # smallest size of its products on a rank: tokens, or columns of a matrix
    work: Work
    memory: float  # bytes that a rank reads at least
    exchange: float  # seconds of communication within the model, by the links' rates

    @property
    def alone(self) -> "Pass":
        """Return the pass without communication."""
        return replace(self, exchange=0.0, work=self.work.alone)


@dataclass(frozen=True)
class Rollout:
    """The forward passes of a replica's rollout."""

    batches: Batches
    of: Pass  # the average one


@dataclass(frozen=True)
class Update:
    """The passes of a replica's update, forward and backward."""

    rows: int  # packed rows of the replica
    micro_batches: int
    bubble: float  # micro-batches that a stage waits for
    of: Pass


def seconds(one: Pass, cluster: Cluster, *, is_update: bool = False) -> float:
    """Return the seconds of a pass: its products, its reads, or its launches, and its exchange.

    With measurements, those of its work.
    """
    work, measured = one.work, cluster.measured
    if measured is not None:
        took = (measured.update if is_update else measured.rollout).seconds(work)
        return took + (0.0 if measured.has_exchange else one.exchange)
    products = work.flops / (cluster.rate * one.narrowest / (one.narrowest + TILE))
    reads = one.memory / cluster.device.bandwidth
    return max(products, reads, work.layers * cluster.launch) + one.exchange


def for_model(cluster: Cluster, model: ModelSettings) -> Cluster:
    """Return a cluster with the rate that the products of a model reach, experts included."""
    of_layer = layer_matrices(model, model.num_layers - 1)
    share = of_layer.topk * of_layer.expert / of_layer.used
    return replace(cluster, products=cluster.products / (1 - share + share / cluster.experts))


def rollout_passes(
    settings: Settings, flops: Flops, cluster: Cluster, weights: int, *, prompts: Sequence[int]
) -> Rollout:
    """Return the passes of a rollout.

    Args:
        weights: bytes of a rank's weights.
        prompts: tokens of some prompts; they stand for all.
    """
    model, sampling, layout = settings.model, settings.sampling, settings.rollout_layout
    algorithm, steps = settings.algorithm, sampling.most_steps
    whole = algorithm.prompts_per_iteration * algorithm.group_size * steps  # steps of all rows
    step_tokens = flops.rollout_work.tokens / whole
    of = rollout_batches(settings, prompts, ranks=cluster.ranks, step_tokens=step_tokens)
    tokens, row = of.together * step_tokens, max(prompts) + sampling.completion_length
    is_cached = settings.caches_keys(sampling)
    keys = of.together * row_bytes(settings, layout, row) if is_cached else 0
    share = layout.pipeline * _ranks_of_a_stage(layout)
    scored = flops.rollout_work.scored / whole * of.together
    sent = exchange(settings, layout, cluster, tokens, scored=scored, directions=1)
    return Rollout(
        of,
        Pass(
            tokens,
            narrowest=_narrowest(model, layout, tokens),
            work=Work(
                flops.rollout / whole * of.together / share,
                _numbers(model, layout, tokens, scored),
                scored * (model.vocab_size or 0) / layout.tensor,
                -(-model.num_layers // layout.pipeline),
                layout.virtual,
                sent.messages,
                sent.sent,
            ),
            memory=weights * _read_share(model, layout, tokens) + keys,
            exchange=sent.seconds,
        ),
    )


def update_passes(settings: Settings, flops: Flops, cluster: Cluster, weights: int) -> Update:
    """Return the passes of one update.

    Args:
        weights: bytes of a rank's weights.
    """
    model, layout = settings.model, settings.parallel
    updates = settings.algorithm.updates_per_iteration
    replicas, packed = data_ranks(layout, cluster.ranks), max(1, flops.update_rows // updates)
    length = flops.update_work.tokens / updates / packed
    rows = -(-packed // replicas)
    count = -(-max(1, flops.update_batches // updates) // replicas)
    if layout.virtual > 1:
        count = -(-count // layout.pipeline) * layout.pipeline
    tokens = rows * length / count
    again = recomputes(model)
    with_gradient = flops.update - flops.update_extra
    whole = (with_gradient * (1 + again / 3) + flops.update_extra) / updates
    of_micro_batch = whole * rows / packed / count
    share = layout.pipeline * _ranks_of_a_stage(layout)
    directions = 2 + (1 if again else 0)
    scored = flops.update_work.scored / updates * rows / packed / count
    sent = exchange(settings, layout, cluster, tokens, scored=scored, directions=directions)
    return Update(
        rows,
        micro_batches=count,
        bubble=(layout.pipeline - 1) / layout.virtual,
        of=Pass(
            tokens,
            narrowest=_narrowest(model, layout, tokens),
            work=Work(
                of_micro_batch / share * _busiest_stage(settings, flops),
                directions * _numbers(model, layout, tokens, scored),
                scored * (model.vocab_size or 0) / layout.tensor,
                directions * -(-model.num_layers // layout.pipeline),
                directions * layout.virtual,
                sent.messages,
                sent.sent,
            ),
            memory=3 * weights * _read_share(model, layout, tokens),
            exchange=sent.seconds,
        ),
    )


def _narrowest(model: ModelSettings, layout: ParallelSettings, tokens: float) -> float:
    return min(max(1.0, tokens / layout.context), model.ffn_hidden_size / layout.tensor)


def _numbers(model: ModelSettings, layout: ParallelSettings, tokens: float, scored: float) -> float:
    """Return the numbers that a stage's operations write that are no products, in a forward.

    After the attention of the last layer, where it ends at scored tokens, of these only.
    """
    attention = 2 * model.hidden_size + 4 * (model.query_width + model.key_width) / layout.tensor
    rest = 4 * model.hidden_size + 3 * model.ffn_hidden_size / layout.tensor
    total = tokens * model.num_layers * (attention + rest)
    if model.ends_at_scored and not layout.sequence:
        total -= (tokens - scored) * rest
    return total / layout.context / layout.pipeline


def _ranks_of_a_stage(layout: ParallelSettings) -> int:
    return layout.tensor * layout.context


def _read_share(model: ModelSettings, layout: ParallelSettings, tokens: float) -> float:
    """Return the share of a rank's weights that a pass of so many tokens reads."""
    matrices = layer_matrices(model, model.num_layers - 1)
    if not matrices.experts:
        return 1.0
    held = matrices.experts * matrices.expert
    met = min(1.0, tokens * matrices.topk * layout.expert / matrices.experts)
    return (matrices.split + met * held) / (matrices.split + held)


def _busiest_stage(settings: Settings, flops: Flops) -> float:
    """Return the work of the busiest stage over that of the average one."""
    model, layout = settings.model, settings.parallel
    if layout.pipeline == 1:
        return 1.0
    chunks, stages = stage_layers(model, layout), layout.pipeline
    layers = [sum(chunks[stage::stages]) for stage in range(stages)]
    head = 3 * 2 * model.hidden_size * (model.vocab_size or 0) * flops.update_work.scored
    each = (flops.update - head) / model.num_layers
    loads = [count * each for count in layers]
    loads[-1] += head
    return max(loads) * stages / flops.update
