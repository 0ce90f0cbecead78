"""Rollout forwards as CUDA graphs: a bucket of packed rows is captured once and replayed.

A graph replays fixed shapes at fixed addresses. So packed rows are padded to a bucket: tokens
and the longest row are rounded up, and empty rows fill the table of boundaries. The layers are
captured, the head is not: the number of scored tokens changes from step to step.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.diffusion.packing import on_device, positions_in_rows
from agrpo_megatron.megatron.layers.packed import PackedLayout
from agrpo_megatron.megatron.model import MaskedDiffusionModel
from agrpo_megatron.types import PackedRows

TOKENS, LENGTH = 128, 64  # tokens and the longest row round up to multiples of these

# Capture a function: returns a function that replays it, and the tensor that each replay writes.
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


class Bucket(NamedTuple):
    """Shapes that a graph serves."""

    tokens: int
    rows: int
    longest: int


@dataclass(frozen=True)
class _Recording:
    """A graph, and the tensors that it reads and writes."""

    tokens: Tensor  # [tokens]
    bounds: Tensor  # [rows + 1] int32
    angles: Tensor  # [tokens, 1, head_dim]
    query_scale: Tensor | None  # [tokens, 1, 1]
    hidden: Tensor  # [tokens, 1, hidden]
    replay: Callable[[], object]


def bucket_of(bounds: Sequence[int]) -> Bucket:
    """Return the bucket of packed rows with these boundaries.

    Tokens are rounded up by at most an eighth. Padding rows are no longer than the longest row, so
    they do not raise the cost of attention.
    """
    count = bounds[-1]
    longest = _up(max(b - a for a, b in itertools.pairwise(bounds)), LENGTH)
    tokens = _up(count, max(TOKENS, 2 ** (count.bit_length() - 4)))
    needed = len(bounds) - 1 + -(-(tokens - count) // longest)
    return Bucket(tokens, 2 ** (needed - 1).bit_length(), longest)


def bucket_bounds(bounds: Sequence[int], bucket: Bucket) -> list[int]:
    """Return boundaries [rows + 1] of a bucket: the rows, rows of padding, and empty rows."""
    padding = range(bounds[-1] + bucket.longest, bucket.tokens, bucket.longest)
    filled = [*bounds, *padding]
    return filled + [bucket.tokens] * (bucket.rows + 1 - len(filled))


class Graphs:
    """Return logits of packed rows, for a model without pipeline or context parallelism.

    A bucket is captured at its second use: many are used only once, since rows end. Valid while the
    weights do not change: one rollout.
    """

    def __init__(self, model: MaskedDiffusionModel, *, record: Recorder | None = None):
        self.model, self._record = model, record or record_on_gpu()
        self._seen: set[Bucket] = set()
        self._recorded: dict[Bucket, _Recording] = {}

    @torch.no_grad()
    def __call__(self, rows: PackedRows) -> Tensor:
        """Return the logits [S, V / tensor parallel] of the scored tokens."""
        bounds = rows.bounds
        bucket = bucket_of(bounds)
        if bucket not in self._seen:
            self._seen.add(bucket)
            return self.model(rows)
        if bucket not in self._recorded:
            self._recorded[bucket] = self._recording(bucket, rows.tokens.device)
        found = self._recorded[bucket]
        full = on_device(bucket_bounds(bounds, bucket), rows.tokens.device, dtype=torch.int32)
        found.tokens.copy_(F.pad(rows.tokens, (0, bucket.tokens - len(rows.tokens))))
        found.bounds.copy_(full)
        positions = positions_in_rows(full, bucket.tokens)
        found.angles.copy_(self.model.angles(positions))
        scale = self.model.query_scale(positions)
        if scale is not None and found.query_scale is not None:
            found.query_scale.copy_(scale)
        found.replay()
        return self.model.head(found.hidden, rows.scored)

    def _recording(self, bucket: Bucket, device: torch.device) -> _Recording:
        tokens = torch.zeros(bucket.tokens, dtype=torch.int64, device=device)
        even = bucket_bounds([0, min(bucket.longest, bucket.tokens)], bucket)
        bounds = on_device(even, device, dtype=torch.int32)
        positions = positions_in_rows(bounds, bucket.tokens)
        angles, scale = self.model.angles(positions), self.model.query_scale(positions)
        layout = PackedLayout(
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=bucket.longest,
            max_seqlen_kv=bucket.longest,
            angles=angles,
            query_scale=scale,
        )
        replay, hidden = self._record(lambda: self.model.body(tokens, layout))
        return _Recording(tokens, bounds, angles, scale, hidden, replay)


def record_on_gpu() -> Recorder:
    """Return a recorder of CUDA graphs that share a memory pool: only one replays at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Warm up the function's kernels, then capture it."""
        now, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(now)
        with torch.cuda.stream(side):
            run()  # chooses and loads kernels, which a capture must not do
        now.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may still make CUDA calls.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            written = run()
        return graph.replay, written

    return record


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
