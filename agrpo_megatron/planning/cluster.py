"""What a plan assumes of the machines: published figures, each replaceable on the command line.

Sources: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 for memory, memory
bandwidth and NVLink; the reference designs of these systems (DGX) for the network, one adapter a
GPU. Rates of matrix products are those of `hardware.rates`. Bandwidths of links are of one
direction.
"""

import re
from dataclasses import dataclass, fields, replace

from agrpo_megatron.hardware.rates import TERA, published_rate
from agrpo_megatron.planning.fit import Measured

GIGA, MICRO = 1e9, 1e-6
MOST_GPUS = 1 << 20


@dataclass(frozen=True)
class Device:
    """A kind of rank, and the links between such ranks."""

    name: str
    memory: float  # GiB
    bandwidth: float  # bytes/s of its memory
    nvlink: float  # bytes/s of a rank in its node, one direction
    network: float  # bytes/s of a rank between nodes, one direction


DEVICES = (
    Device("A100", 80, 2.039e12, 300e9, 25e9),
    Device("H100", 80, 3.35e12, 450e9, 50e9),
    Device("H200", 140, 4.8e12, 450e9, 50e9),
    Device("B200", 179, 8e12, 900e9, 50e9),
    # A rank on a CPU; ranks of a node exchange by shared memory.
    Device("CPU", 16, 20e9, 5e9, 1e9),
)
# Share of the peak that matrix products reach alone, without communication and bubbles. Source:
# Megatron-LM reports 47 % of a whole bf16 iteration of 175 billion weights on 96 H100, bubbles and
# communication included; Megatron-Bridge 744 TFLOP/s in FP8 for 8 billion on 8 H100.
PRODUCTS = {"bf16": 0.55, "fp8": 0.42, "fp32": 0.6}
# Share of that which experts reach. Source: 206 TFLOP/s in FP8 for Qwen3-30B-A3B on 16 H100
# (Megatron-Bridge), 328 in bf16 for a hybrid of 30 billion weights on 8 H100 (NeMo AutoModel).
EXPERTS = {"bf16": 0.5, "fp8": 0.25, "fp32": 1.0}
LINKS = 0.8  # share of a link's rate that collectives reach
LATENCY = 15e-6  # seconds of a collective without data
LAUNCH = 60e-6  # seconds that a layer takes at least in each direction: its kernels' launches


@dataclass(frozen=True)
class Cluster:
    """Ranks, and every assumption on them."""

    device: Device
    ranks: int
    per_node: int  # ranks of a node
    peak: float  # FLOP/s of matrix products on one rank
    products: float  # share of the peak that matrix products reach
    experts: float = 1.0  # share of that which products of experts reach
    links: float = LINKS
    latency: float = LATENCY
    launch: float = LAUNCH
    overlap: float = 0.0  # share of the exchange of gradients and weights that computation hides
    measured: Measured | None = None  # in place of rates, reads and launches

    @property
    def nodes(self) -> int:
        """Return the nodes of the ranks."""
        return -(-self.ranks // self.per_node)

    @property
    def rate(self) -> float:
        """Return the FLOP/s that matrix products reach on one rank."""
        return self.peak * self.products

    def with_measured(self, measured: Measured) -> "Cluster":
        """Return the cluster with a measured speed of its ranks."""
        return replace(self, measured=measured)

    def link(self, *, size: int, stride: int) -> float:
        """Return the bytes/s of each rank of a group in a collective.

        Args:
            size: ranks of the group.
            stride: from a rank of the group to the next. Ranks of a node that are in the group
                send through an adapter each.
        """
        device = self.device
        if size * stride <= self.per_node:
            return self.links * device.nvlink
        local = max(1, self.per_node // stride)
        return self.links * min(device.nvlink, local * device.network)

    def scatter(self, *, size: int, stride: int) -> float:
        """Return the bytes/s of each rank of a group where every rank sends to every other.

        Each rank sends what leaves its node through its own adapter.
        """
        device, local = self.device, min(size, max(1, self.per_node // stride))
        away = (size - local) / (size - 1)
        return self.links / ((1 - away) / device.nvlink + away / device.network)


@dataclass(frozen=True)
class Given:
    """What replaces an assumption; None: the published figure."""

    memory: float | None = None  # GiB
    peak: float | None = None  # TFLOP/s
    bandwidth: float | None = None  # GB/s
    nvlink: float | None = None  # GB/s
    network: float | None = None  # GB/s
    gpus_per_node: int | None = None
    mfu: float | None = None
    experts: float | None = None
    links: float | None = None
    latency: float | None = None  # microseconds
    launch: float | None = None  # microseconds
    overlap: float | None = None


def read_cluster(text: str, precision: str, given: Given) -> Cluster:
    """Return the cluster of a text such as 128xH100.

    Raises:
        ValueError: the text or a given figure is wrong.
    """
    ranks, device = _parsed(text)
    for field in fields(given):
        _check(field.name, getattr(given, field.name))
    rates = {name: getattr(given, name) for name in ("bandwidth", "nvlink", "network")}
    changes = {name: value * GIGA for name, value in rates.items() if value is not None}
    if given.memory is not None:
        changes["memory"] = given.memory
    device = replace(device, **changes)
    per_node = given.gpus_per_node or (ranks if device.name == "CPU" else 8)
    return Cluster(
        device,
        ranks,
        per_node=min(per_node, ranks),
        peak=_peak(device, precision, given.peak),
        products=PRODUCTS[precision] if given.mfu is None else given.mfu,
        experts=EXPERTS[precision] if given.experts is None else given.experts,
        links=LINKS if given.links is None else given.links,
        latency=LATENCY if given.latency is None else given.latency * MICRO,
        launch=LAUNCH if given.launch is None else given.launch * MICRO,
        overlap=given.overlap or 0.0,
    )


def read_ranks(text: str) -> int:
    """Return the number in a text such as 128xH100.

    Raises:
        ValueError: the text is wrong.
    """
    return _parsed(text)[0]


def assumption(cluster: Cluster, precision: str) -> str:
    """Return what a plan assumes of the speed of a rank, in words."""
    if cluster.measured is not None:
        return cluster.measured.text
    hidden = f"; {100 * cluster.overlap:g} % of it hidden" if cluster.overlap else ", none hidden"
    return (
        f"{precision} products at {100 * cluster.products:.3g} % of {cluster.peak / TERA:.4g} "
        f"TFLOP/s, those of experts at {100 * cluster.experts:g} % of that; "
        f"{cluster.latency / MICRO:g} us at least for a message and {cluster.launch / MICRO:g} us "
        f"for a layer; communication{hidden}; rewards and saves take nothing"
    )


def _parsed(text: str) -> tuple[int, Device]:
    found = re.fullmatch(r"(\d{1,7})\s*[xX*]\s*([a-zA-Z]+\d*)", text.strip())
    devices = {device.name.lower(): device for device in DEVICES}
    device = devices.get(found[2].lower()) if found else None
    ranks = int(found[1]) if found else 0
    if device is None or not 1 <= ranks <= MOST_GPUS:
        names = ", ".join(one.name for one in DEVICES)
        raise ValueError(
            f"--gpus={text} is not a number and a kind of GPU; write for example 128xH100, with "
            f"one of {names}; --memory, --peak and --bandwidth replace its figures"
        )
    return ranks, device


def _check(name: str, value: float | None) -> None:
    """Refuse a figure that is no figure."""
    if value is None:
        return
    shares = dict.fromkeys(("mfu", "experts", "links"), (1e-4, 1))
    delays = dict.fromkeys(("latency", "launch"), (0, 1e6))
    ranges = {"overlap": (0, 1), "gpus_per_node": (1, 1024), **shares, **delays}
    low, high = ranges.get(name, (1e-6, 1e9))
    if not low <= value <= high:
        key = name.replace("_", "-")
        raise ValueError(f"--{key}={value:g} must be from {low:g} to {high:g}")


def _peak(device: Device, precision: str, given: float | None) -> float:
    if given is not None:
        return given * TERA
    if device.name == "CPU":
        from agrpo_megatron.hardware.rates import device_rate  # loads torch

        found = device_rate(precision, gpu=None)
    else:
        found = published_rate(device.name, "tf32" if precision == "fp32" else precision)
    if found is None:
        raise ValueError(
            f"precision={precision}: {device.name} has no {precision} products; use precision=bf16"
        )
    return found.flops
