"""Seconds in which the ranks of a replica exchange activations."""

from agrpo_megatron.config.settings import ParallelSettings, Settings
from agrpo_megatron.planning.cluster import Cluster
from agrpo_megatron.scaling.memory import BFLOAT16, FLOAT32


def width(settings: Settings) -> int:
    """Return the bytes of an activation."""
    return FLOAT32 if settings.precision == "fp32" else BFLOAT16


def exchange(
    settings: Settings,
    layout: ParallelSettings,
    cluster: Cluster,
    tokens: float,
    *,
    directions: int,
) -> float:
    """Return the seconds that a stage's ranks exchange activations in a pass.

    In each direction and layer, tensor parallelism sums twice the residual stream; a sum is a
    reduce-scatter and an all-gather, also with sequence parallelism, which gathers once more in
    the backward pass. Experts receive and return each token `moe.topk` times. A pipeline sends the
    residual stream once for each virtual stage. Context parallelism gathers the keys and values of
    a row that crosses parts: at most all of them.
    """
    model, size = settings.model, width(settings)
    tensor, expert, context = layout.tensor, layout.expert, layout.context
    mine = tokens / context
    layers = model.num_layers / layout.pipeline
    stream = mine * model.hidden_size * size
    total = 0.0
    if tensor > 1:
        link = cluster.link(size=tensor, stride=1)
        sums = 2 * directions
        halves = 2 * sums + (2 if layout.sequence and directions > 1 else 0)
        total += layers * (halves * (tensor - 1) / tensor * stream / link + sums * cluster.latency)
    if context > 1:
        link = cluster.link(size=context, stride=tensor)
        keys = 2 * tokens * model.key_width / tensor * size
        gathered = directions * (context - 1) / context * keys / link
        total += layers * (gathered + directions * cluster.latency)
    if expert > 1 and model.moe.experts:
        link = cluster.scatter(size=expert, stride=layout.expert_tensor)
        share = mine / (tensor if layout.sequence else 1) * layout.expert_tensor
        copies = share * model.moe.topk * model.hidden_size * size
        sent = 2 * directions * (expert - 1) / expert * copies / link
        routed = model.moe_layers / layout.pipeline
        total += routed * (sent + 2 * directions * cluster.latency)
    if layout.pipeline > 1:
        stride = cluster.ranks // layout.pipeline
        link = cluster.link(size=layout.pipeline, stride=stride)
        sent = stream / (tensor if layout.sequence else 1) / link
        total += directions * layout.virtual * (sent + cluster.latency)
    return total
