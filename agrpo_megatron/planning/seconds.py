"""Seconds of an iteration under a layout, by roofline: rollout, update, exchange, optimizer.

A pass takes as long as its products at the rate that products reach, or as its reads of weights
and cached keys, or as the launches of its kernels, whichever is longest; communication within
the model comes on top. Rewards, saves, sampling from logits and other small operations are not
counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from agrpo_megatron.config.parallel import data_ranks
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.planning.cluster import Cluster
from agrpo_megatron.planning.exchange import Exchange, width
from agrpo_megatron.planning.fit import Work
from agrpo_megatron.planning.passes import (
    Rollout,
    Update,
    rollout_passes,
    seconds,
    update_passes,
)
from agrpo_megatron.scaling.forecast.work import Flops
from agrpo_megatron.scaling.memory import Memory

HOST = 25e9  # bytes/s between a GPU and its host


@dataclass(frozen=True)
class Times:
    """Seconds of an iteration by part; all parts follow one another."""

    rollout: float  # products, reads and launches of forward passes
    rollout_exchange: float  # communication within the model
    rollout_bubble: float  # stages that wait for rows
    update: float
    update_exchange: float
    update_bubble: float
    gradients: float  # exchange of gradients and weights between data-parallel ranks
    optimizer: float
    reshard: float  # weights to another layout of the rollouts
    rest: float = 0.0  # outside rollout and update, where it was measured

    @property
    def total(self) -> float:
        """Return the seconds of an iteration."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Iteration:
    """What an iteration does under a layout, and how long it takes."""

    times: Times
    rollout: Rollout
    update: Update
    gradients: Work  # what an update sends of gradients and weights


def iteration(
    settings: Settings, flops: Flops, cluster: Cluster, memory: Memory, *, prompts: Sequence[int]
) -> Iteration:
    """Return an iteration of settings with a legal layout.

    Args:
        memory: of the fullest rank under the layout.
        prompts: tokens of some prompts; they stand for all.
    """
    updates = settings.algorithm.updates_per_iteration
    copy = memory.rollout_copy
    sampled = rollout_passes(settings, flops, cluster, copy or memory.weights, prompts=prompts)
    trained = update_passes(settings, flops, cluster, memory.weights)
    step = seconds(sampled.of, cluster)
    alone = seconds(sampled.of.alone, cluster)
    learn = seconds(trained.of, cluster, is_update=True)
    learn_alone = seconds(trained.of.alone, cluster, is_update=True)
    measured, algorithm = cluster.measured, settings.algorithm
    gradients = gradient_exchange(settings, cluster, memory)
    exchanged = (1 - cluster.overlap) * gradients.seconds
    if measured is not None and measured.has_exchange:
        exchanged = measured.update.seconds(gradients.work)
    has_rollouts = settings.train.from_rollouts is None
    completions = algorithm.prompts_per_iteration * algorithm.group_size
    count = sampled.batches.count * has_rollouts * (measured.rollout_share if measured else 1)
    updates *= measured.update_share if measured else 1
    times = Times(
        rollout=count * alone,
        rollout_exchange=count * (step - alone),
        rollout_bubble=count * step * sampled.batches.waits,
        update=updates * trained.micro_batches * learn_alone,
        update_exchange=updates * trained.micro_batches * (learn - learn_alone),
        update_bubble=updates * trained.bubble * learn,
        gradients=updates * exchanged,
        optimizer=0.0 if measured else updates * _optimizer(memory, cluster),
        reshard=copy / cluster.device.network * has_rollouts,
        rest=completions * measured.rest if measured else 0.0,
    )
    return Iteration(times, sampled, trained, gradients.work)


def gradient_exchange(settings: Settings, cluster: Cluster, memory: Memory) -> Exchange:
    """Return what ranks with equal weights exchange of gradients and weights in an update.

    Experts are exchanged in groups of their own, over the same bytes.
    """
    layout, replicas = settings.parallel, data_ranks(settings.parallel, cluster.ranks)
    group = replicas * layout.context
    if group == 1:
        return Exchange()
    link = cluster.link(size=group, stride=layout.tensor)
    sent = memory.gradients * (1 if settings.optimizer.distributed else 2)
    if settings.optimizer.distributed:
        is_short = settings.optimizer.main_gradients == "bf16" or settings.precision == "fp32"
        sent += memory.gradients * (1 if is_short else width(settings) / 4)
    is_local = group * layout.tensor <= cluster.per_node
    steps = 1 if is_local else cluster.nodes
    sent *= (group - 1) / group
    return Exchange().plus(2 * steps, sent, link=link, latency=cluster.latency)


def _optimizer(memory: Memory, cluster: Cluster) -> float:
    """Return the seconds of reading and writing the optimizer's states."""
    states = memory.main_weights + memory.moments
    return (2 * states + memory.gradients) / cluster.device.bandwidth + 2 * memory.host / HOST
