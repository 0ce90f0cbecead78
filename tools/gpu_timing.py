"""Measurements of one GPU: matrix ceilings, rollout forwards and updates."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_jobs import Job
from gpu_model import (
    LLADA_8B,
    REHEARSAL,
    Scale,
    free_memory,
    open_engine,
    open_network,
    random_batch,
    random_rows,
    scale_settings,
    work_of,
)
from torch import Tensor

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.draw import draw_tokens
from agrpo_megatron.estimators.objective import make_loss
from agrpo_megatron.hardware.kernels import kernels_for
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.pipeline import make_forward
from agrpo_megatron.scaling.flops import forward_cost, update_cost
from agrpo_megatron.training.step import optimizer_step
from agrpo_megatron.types import PackedRows

SETS = 3  # of rotating inputs, so that no run finds the last input in a cache
SMALL = (1, 2, 4)  # rows of the rollout batches that graphs are timed with


def run_job(job: Job, *, is_rehearsal: bool) -> dict[str, Any]:
    """Return the figures of a job; `refused` says why it cannot run here."""
    free_memory()  # of the job before
    scale = REHEARSAL if is_rehearsal else LLADA_8B
    scale = replace(scale, rows=max(1, scale.rows // job.fewer))
    if job.kind == "ceiling":
        size = 256 if is_rehearsal else 8192
        device = torch.device("cpu" if is_rehearsal else "cuda")
        found = ceilings(size, repeats=scale.repeats, device=device)
        return {"machine": machine(device), "ceilings": found}
    settings = scale_settings(scale, *job.overrides)
    try:
        kernels_for(settings)
        if job.kind == "graphs":
            return {"graphs": small_batches(settings, scale)}
    except ValueError as error:
        return {"refused": str(error)}
    return throughput(settings, scale, slower=job.slower)


def machine(device: torch.device) -> dict[str, Any]:
    """Return torch's description of the GPU, and its versions."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type != "cuda":
        return {**found, "gpu": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        **found,
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cudnn": torch.backends.cudnn.version(),
    }


def ceilings(size: int, *, repeats: int, device: torch.device) -> dict[str, Any]:
    """Return the TFLOP/s of square matrix products of random numbers, by dtype."""
    products: dict[str, Callable[[int, int, torch.device], Callable[[], Any]]] = {
        "bf16": partial(_plain_product, torch.bfloat16),
        "fp8": _fp8_product,
        "fp32": partial(_plain_product, torch.float32),
    }
    found: dict[str, Any] = {"size": size}
    for name, make in products.items():
        try:
            calls = [make(size, seed, device) for seed in range(SETS)]
            spent = seconds_of(_rotated(calls), repeats=3 * repeats, device=device)
        except (RuntimeError, ValueError) as error:  # a GPU without FP8
            found[name] = None
            found[f"{name}_refused"] = str(error).partition("\n")[0]
            continue
        found[name] = 2 * size**3 / statistics.median(spent) / 1e12
        calls.clear()
        free_memory()
    return found


def throughput(settings: Settings, scale: Scale, *, slower: int = 1) -> dict[str, Any]:
    """Return speed and peak memory of rollout forwards, then of updates."""
    engine = open_engine(settings)
    rollout = time_rollout(engine.rollout_network(), settings, scale)
    update = time_update(engine, settings, scale, count=max(1, scale.micro_batches // slower))
    return {"rollout": rollout, "update": update}


def time_rollout(network: Network, settings: Settings, scale: Scale) -> dict[str, Any]:
    """Time one denoising step of packed rows: the forward, and the draws at the scored tokens."""
    device = network.ranks.device
    sets = [random_rows(scale, seed=seed, device=device) for seed in range(SETS)]
    forward = make_forward(network, settings.rollout, sampling=settings.sampling)
    draw = partial(_draw, network, settings)
    _start_memory(device)
    calls = [partial(_denoise, forward, rows, draw) for rows in sets]
    spent = seconds_of(_rotated(calls), repeats=3 * scale.repeats, device=device)
    flops = forward_cost(settings.model, settings.lora).of(work_of(sets[0]))
    return _speed(spent, tokens=len(sets[0].tokens), flops=flops, device=device)


def time_update(engine: Engine, settings: Settings, scale: Scale, *, count: int) -> dict[str, Any]:
    """Time a whole update: forward and backward of `count` micro-batches, and the optimizer."""
    device = engine.ranks.device
    batches = [random_batch(scale, seed=100 + n, device=device) for n in range(count)]
    loss = make_loss(engine.network.vocab, settings.sampling, settings.algorithm)

    def update() -> None:
        optimizer_step(engine, batches, loss=loss, examples=count * scale.rows)

    _start_memory(device)
    spent = seconds_of(update, repeats=scale.repeats, device=device, warm=1)
    cost = update_cost(settings.model, settings.lora)
    flops = sum(cost.of(work_of(batch.rows)) for batch in batches)
    tokens = sum(len(batch.rows.tokens) for batch in batches)
    return _speed(spent, tokens=tokens, flops=flops, device=device) | {"micro_batches": count}


def small_batches(settings: Settings, scale: Scale) -> list[dict[str, Any]]:
    """Time rollout forwards of a few rows, launched one kernel at a time and as CUDA graphs."""
    found = []
    for is_graph in (False, True):
        kernels = replace(settings.kernels, cuda_graphs=is_graph)
        chosen = replace(settings, kernels=kernels)
        network = open_network(chosen)
        for rows in SMALL:
            small = replace(scale, rows=rows, group=1)
            found.append({"rows": rows, "graphs": is_graph, **time_rollout(network, chosen, small)})
    return found


def seconds_of(
    function: Callable[[], Any], *, repeats: int, device: torch.device, warm: int = 2
) -> list[float]:
    """Return the seconds of each of `repeats` calls, by the device's own clock, after warming up.

    On a GPU every call is between two events, and nothing waits until all calls are launched.
    """
    for _ in range(warm):
        function()
    if device.type != "cuda":
        spent = []
        for _ in range(repeats):
            started = time.perf_counter()
            function()
            spent.append(time.perf_counter() - started)
        return spent
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    pairs = zip(marks, marks[1:], strict=False)
    return [first.elapsed_time(second) / 1e3 for first, second in pairs]


def _start_memory(device: torch.device) -> None:
    if device.type == "cuda":
        free_memory()
        torch.cuda.reset_peak_memory_stats()


def _speed(spent: list[float], *, tokens: int, flops: int, device: torch.device) -> dict[str, Any]:
    middle = statistics.median(spent)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "tokens": tokens,
        "seconds": middle,
        "spread": [min(spent), max(spent)],
        "tokens_per_second": tokens / middle,
        "tflops": flops / middle / 1e12,
        "peak_gib": peak,
    }


def _rotated(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Return a function that makes the next call, in a cycle."""
    state = {"next": 0}

    def call() -> None:
        calls[state["next"] % len(calls)]()
        state["next"] += 1

    return call


def _denoise(forward: Any, rows: PackedRows, draw: Callable[[Tensor, slice], Any]) -> None:
    forward(rows, draw)()


def _draw(network: Network, settings: Settings, logits: Tensor, part: slice) -> Any:
    keys = torch.arange(len(logits), device=logits.device)
    keys = noise.noise_key(settings.run.seed, noise.TOKENS, keys)
    return draw_tokens(logits, keys, vocab=network.vocab, sampling=settings.sampling)


def _plain_product(
    dtype: torch.dtype, size: int, seed: int, device: torch.device
) -> Callable[[], Any]:
    left, right = (_numbers(size, seed + n, device).to(dtype) for n in (0, 1))
    return partial(torch.matmul, left, right)


def _fp8_product(size: int, seed: int, device: torch.device) -> Callable[[], Any]:
    """Return a product with one scale per tensor: the fastest for Hopper's FP8 units."""
    left, right = (_numbers(size, seed + n, device).to(torch.float8_e4m3fn) for n in (0, 1))
    one = torch.ones((), device=device)
    return partial(
        torch._scaled_mm,
        left,
        right.t(),
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _numbers(size: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, size, generator=generator, device=device)
