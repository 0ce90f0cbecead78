"""Seconds, peak memory and a ceiling of matrix products, on a CPU or a GPU."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from agrpo_megatron.config.settings import ModelSettings

MEASURED = "agrpo: measured"  # name of the profiled run
CEILING_SECONDS = 0.2  # that a measurement of the ceiling takes, at least


def interleaved(
    runs: Mapping[str, Callable[[], Any]], *, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of each run in each repeat; a repeat has every run once, in turn.

    On a CPU these are the seconds that the process computed, which other processes do not add to.
    """
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = _now(device)
            run()
            spent[name].append(_now(device) - started)
    return spent


def _now(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes of tensors that a run holds at once, above those from before it.

    Runs twice and measures the second run: the first one may create what is then kept, such as the
    optimizer's states. On a CPU, torch's profiler lists each allocation; workspaces of libraries
    are not among them.
    """
    if device.type == "cuda":
        run()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()  # it also frees what is not known to the profiler
        with record_function(MEASURED):
            run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == MEASURED)
    changes = [e for e in events if e.name() == "[memory]" and e.start_ns() >= start]
    held = peak = 0
    for change in sorted(changes, key=lambda change: change.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


class Products:
    """Products of random matrices in the shapes of a layer, as fast as torch computes them.

    Args:
        rows, length: of a forward pass.
        with_attention: whether the attention's products of queries with keys, and of weights with
            values, are among them.
    """

    def __init__(
        self,
        model: ModelSettings,
        *,
        rows: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        with_attention: bool = False,
    ):
        hidden, ffn, width = model.hidden_size, model.ffn_hidden_size, model.head_width
        wide, tokens = model.query_width + 2 * model.key_width, rows * length
        shapes = [(1, tokens, hidden, wide), (1, tokens, model.query_width, hidden)]
        shapes += [(1, tokens, hidden, 2 * ffn), (1, tokens, ffn, hidden)]
        if with_attention:
            heads = rows * model.num_attention_heads
            shapes += [(heads, length, width, length), (heads, length, length, width)]
        random = partial(torch.randn, dtype=dtype, device=device)
        # The right matrices are transposed, as weights and keys are.
        self._pairs = [(random(n, i, j), random(n, k, j).mT) for n, i, j, k in shapes]
        self._once = sum(2 * n * i * j * k for n, i, j, k in shapes)
        started = _now(device)
        self._multiply()
        self._multiply()
        self.times = max(1, round(CEILING_SECONDS / max(1e-6, (_now(device) - started) / 2)))

    @property
    def flops(self) -> int:
        """Return the FLOPs of a run."""
        return self._once * self.times

    def __call__(self) -> None:
        """Multiply all of them, `times` times."""
        for _ in range(self.times):
            self._multiply()

    def _multiply(self) -> None:
        for left, right in self._pairs:
            torch.bmm(left, right) if len(left) > 1 else torch.mm(left[0], right[0])


def seconds_within(module: nn.Module, run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a run spends in the forward passes of a module."""
    started, spent = [0.0], [0.0]

    def enter(*_: Any) -> None:
        started[0] = _now(device)

    def leave(*_: Any) -> None:
        spent[0] += _now(device) - started[0]

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return spent[0]


def speedup(ours: list[float], reference: list[float]) -> dict[str, float]:
    """Return the ratio of the medians, and the least and the largest ratio of a repeat."""
    pairs = [theirs / mine for mine, theirs in zip(ours, reference, strict=True)]
    middle = statistics.median(reference) / statistics.median(ours)
    return {"median": middle, "min": min(pairs), "max": max(pairs)}
