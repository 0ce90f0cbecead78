"""A plan as text and as JSON."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from agrpo_megatron.planning.cluster import Cluster
from agrpo_megatron.planning.ranking import GIB, Candidate, Ranking
from agrpo_megatron.planning.reasons import comparison, scenarios
from agrpo_megatron.reports.text import compact, counted, duration, flop
from agrpo_megatron.scaling.forecast.disk import parameters
from agrpo_megatron.scaling.memory import PARTS, SPARE, Memory

ITERATIONS = 1000  # of which cost and energy are given
COMPARED = 3  # layouts after the first with which it is compared
NEAR = 3  # layouts that do not fit, named with their memory
# Parts of a rank's memory as they are shown, by the fields that each adds up.
SHOWN = {
    "weights": ("weights", "fp8_copies", "rollout_copy", "reference", "unmerged"),
    "gradients": ("gradients",),
    "optimizer": ("main_weights", "moments"),
    "activations": ("activations",),
    "logits": ("logits",),
    "keys and values": ("rollout_cache",),
}


@dataclass(frozen=True)
class Prices:
    """What a GPU costs; None: not asked for."""

    price: float | None = None  # of a GPU-hour
    watts: float | None = None  # of a GPU, with its share of the machine

    def check(self) -> None:
        """Refuse a price or wattage that is none.

        Raises:
            ValueError: it is not positive.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{field.name}={value:g} must be positive; use for example 2.5")


def lines_before(ranking: Ranking, assumed: str) -> list[str]:
    """Return the model and what the plan assumes.

    Args:
        assumed: on the speed of a rank.
    """
    model, cluster = ranking.model, ranking.cluster
    whole, trained = parameters(model.settings)
    flops, device = ranking.flops, cluster.device
    links = (
        f"NVLink {device.nvlink / 1e9:g} and network {device.network / 1e9:g} GB/s a GPU in one "
        f"direction, {100 * cluster.links:g} % of which collectives reach"
    )
    return [
        f"model     {model.name}: {compact(whole)} parameters, {compact(trained)} trained, "
        f"{model.settings.precision}",
        f"machine   {cluster.ranks} x {device.name}, {counted(cluster.nodes, 'node')} of "
        f"{cluster.per_node}: {device.memory:g} GiB, {device.bandwidth / 1e12:.3g} TB/s; {links}",
        f"assumed   {assumed}",
        *(f"assumed   {line}" for line in model.assumed),
        f"work      rollout {flop(flops.rollout)}, update {flop(flops.update)} an iteration",
    ]


def table(ranking: Ranking, *, rows: int) -> Table:
    """Return the first layouts that fit: seconds of an iteration, and GiB of the fullest rank."""
    shown = Table(box=SIMPLE_HEAD)
    shown.add_column("layout", no_wrap=True)
    for name in ("s/iteration", "rollout", "update", "bubble", "exchange", "tokens/s"):
        shown.add_column(name, justify="right")
    for name in (*SHOWN, "buffers", "of GiB"):
        shown.add_column(name, justify="right")
    for one in ranking.fitting[:rows]:
        times = one.iteration.times
        bubble = times.rollout_bubble + times.update_bubble
        exchange = times.rollout_exchange + times.update_exchange + times.gradients + times.reshard
        parts = [times.rollout, times.update + times.optimizer + times.rest, bubble, exchange]
        numbers = [one.seconds, *parts, tokens_per_second(one)]
        memory = [bytes_ / GIB for bytes_ in memory_parts(one.memory, ranking.cluster).values()]
        total = f"{sum(memory):.0f}/{ranking.cluster.device.memory:g}"
        shown.add_row(one.name, *map(_digits, numbers), *(f"{m:.1f}" for m in memory), total)
    return shown


def lines_after(ranking: Ranking, prices: Prices) -> list[str]:
    """Return why the first layout is first, what would change it, and what it costs."""
    found = []
    if ranking.fitting:
        first, *others = ranking.fitting
        said = [comparison(first, other) for other in others[:COMPARED]]
        found += [f"first     {first.name}: {line}" for line in said]
        found += [
            f"with      {one.text}: {one.first.name} in {_digits(one.first.seconds)} s, "
            f"{first.name} in {_digits(one.earlier.seconds)} s"
            for one in scenarios(ranking)
        ] or [f"with      no change that was tried puts another layout before {first.name}"]
        found += _passes(first) + _costs(first, ranking.cluster, prices)
    return found + _not_fitting(ranking)


def _passes(one: Candidate) -> list[str]:
    """Return what a replica does in an iteration."""
    rollout, update = one.iteration.rollout.batches, one.iteration.update
    return [
        f"replica   {counted(rollout.rows, 'completion')}, at most {rollout.largest} in a forward "
        f"pass, {rollout.count} passes; an update of {counted(update.rows, 'row')} in "
        f"{update.micro_batches} micro-batches of {update.of.tokens:.0f} tokens"
    ]


def costs(one: Candidate, cluster: Cluster, prices: Prices) -> dict[str, float]:
    """Return hours, GPU-hours, cost and kWh of 1,000 iterations."""
    hours = ITERATIONS * one.seconds / 3600
    found = {"hours": hours, "gpu_hours": hours * cluster.ranks}
    if prices.price is not None:
        found["cost"] = found["gpu_hours"] * prices.price
    if prices.watts is not None:
        found["kwh"] = found["gpu_hours"] * prices.watts / 1000
    return found


def _costs(one: Candidate, cluster: Cluster, prices: Prices) -> list[str]:
    found = costs(one, cluster, prices)
    said = f"{duration(3600 * found['hours'])}, {compact(found['gpu_hours'])} GPU-hours"
    if prices.price is not None:
        said += f", {compact(found['cost'])} at {prices.price:g} a GPU-hour"
    if prices.watts is not None:
        said += f", {compact(found['kwh'])} kWh at {prices.watts:g} W a GPU"
    return [f"cost      {ITERATIONS} iterations: {said}"]


def _not_fitting(ranking: Ranking) -> list[str]:
    """Return how many layouts fit, and why others do not."""
    cluster, found = ranking.cluster, list[str]()
    room = SPARE * cluster.device.memory
    fits, large = len(ranking.fitting), len(ranking.too_large)
    found.append(
        f"fit       {fits} of {fits + large} legal layouts need at most {room:.3g} GiB, "
        f"which leaves {100 * (1 - SPARE):.0f} % for buffers"
    )
    for one in ranking.too_large[:NEAR]:
        parts = memory_parts(one.memory, cluster)
        parts.pop("buffers")
        most = max(parts, key=lambda name: parts[name])
        found.append(
            f"too large {one.name}: {one.memory.total / GIB:.1f} GiB, of which "
            f"{parts[most] / GIB:.1f} are {most}"
        )
    if not fits:
        found.append(
            "nothing fits: use more GPUs, a smaller train.token_budget, optimizer.moments=bf16, or "
            "model.megatron={recompute_granularity: full, recompute_method: uniform, "
            "recompute_num_layers: 1}"
        )
    found += [f"refused   {count} layouts: {rule}" for rule, count in ranking.illegal.most_common()]
    return found


def tokens_per_second(one: Candidate) -> float:
    """Return the completion tokens of an iteration over its seconds, of all ranks together."""
    algorithm, sampling = one.settings.algorithm, one.settings.sampling
    count = algorithm.prompts_per_iteration * algorithm.group_size
    return count * sampling.completion_length / one.seconds


def memory_parts(memory: Memory, cluster: Cluster) -> dict[str, float]:
    """Return the bytes of a rank by part; buffers are the share that is left for them."""
    parts: dict[str, float] = {
        name: sum(getattr(memory, field) for field in names) for name, names in SHOWN.items()
    }
    return {**parts, "buffers": (1 - SPARE) * cluster.device.memory * GIB}


def as_json(ranking: Ranking, assumed: str, prices: Prices) -> dict[str, Any]:
    """Return a plan as JSON takes it: every layout, seconds and bytes."""
    whole, trained = parameters(ranking.model.settings)
    return {
        "model": ranking.model.name,
        "parameters": whole,
        "trained_parameters": trained,
        "cluster": asdict(ranking.cluster),
        "assumed": [assumed, *ranking.model.assumed],
        "flops": {"rollout": ranking.flops.rollout, "update": ranking.flops.update},
        "layouts": [_layout(one, ranking.cluster, prices) for one in ranking.fitting],
        "too_large": {one.name: one.memory.total for one in ranking.too_large},
        "refused": dict(ranking.illegal),
    }


def _layout(one: Candidate, cluster: Cluster, prices: Prices) -> dict[str, Any]:
    return {
        "layout": one.name,
        "seconds": one.seconds,
        "times": asdict(one.iteration.times),
        "tokens_per_second": tokens_per_second(one),
        "memory": {part: getattr(one.memory, part) for part in (*PARTS, "host")},
        "memory_total": one.memory.total,
        "costs": costs(one, cluster, prices),
    }


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
