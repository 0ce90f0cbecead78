"""Completions go to disk while others are sampled, in a bounded share of the rollout's time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.rollout import cache
from agrpo_megatron.rollout.cache import CompletionWriter
from agrpo_megatron.trajectories import moved, tensors
from agrpo_megatron.types import Trajectory

ROWS, LENGTH, TOP_K = 64, 256, 150


def completion(row: int, support: int | None = TOP_K) -> Trajectory:
    """Return a completion as the sampler hands it over."""
    whole, wide = torch.full((1, LENGTH), row), torch.zeros(1, LENGTH)
    return Trajectory(
        prompts=(torch.zeros(3, dtype=torch.int64),),
        tokens=whole,
        unmask_step=whole,
        logprobs=wide,
        entropies=wide,
        spreads=wide,
        support_ids=None if support is None else torch.zeros(1, LENGTH, support).int(),
        num_steps=torch.tensor([LENGTH]),
        rollout_ids=torch.tensor([row]),
        sampling=SamplingSettings(),
    )


def size(trajectory: Trajectory) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(trajectory).values())


@dataclass
class Storage:
    """A clock, a copy to the host and a disk, at so many bytes a second."""

    copies: float
    writes: float
    now: float = 0.0
    busy: float = 0.0
    copied: list[int] = field(default_factory=list)
    written: list[Trajectory] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now, self.busy = self.now + seconds, self.busy + seconds

    def moved(self, trajectory: Trajectory, device: str) -> Trajectory:
        self.copied.append(size(trajectory))
        self.work(size(trajectory) / self.copies)
        return moved(trajectory, device)

    def write(self, trajectory: Trajectory) -> None:
        self.written.append(trajectory)
        self.work(size(trajectory) / self.writes)


def rollout(monkeypatch, storage: Storage, seconds: Sequence[float]) -> CompletionWriter:
    """Let a completion end after each of these times; a rollout that ends so is kept as a whole."""
    monkeypatch.setattr(cache, "time", storage)
    monkeypatch.setattr(cache, "moved", storage.moved)
    writer = CompletionWriter(storage.write)
    for row, wait in enumerate(seconds):
        storage.now += wait
        writer.add(completion(row))
    return writer


@pytest.mark.parametrize(("copies", "writes"), [(3e9, 1e9), (3e9, 3e6), (3e6, 1e9)])
def test_copying_and_writing_take_a_bounded_share(monkeypatch, copies, writes):
    """On a slow disk and over a slow bus as well, except for the last write."""
    storage = Storage(copies, writes)
    rollout(monkeypatch, storage, [1.0] * ROWS)
    last = size(storage.written[-1]) * (1 / copies + 1 / writes)
    assert storage.busy <= 0.02 * storage.now + last


def test_each_byte_is_copied_once_and_with_what_is_written(monkeypatch):
    storage = Storage(copies=3e6, writes=1e7)
    rollout(monkeypatch, storage, [0.1] * ROWS).flush()  # as where a run is stopped
    assert storage.copied == [size(part) for part in storage.written]
    assert 1 < len(storage.written) < ROWS, "several at once, as each takes 60 ms"
    ids = [number for part in storage.written for number in part.rollout_ids.tolist()]
    assert ids == list(range(ROWS))


def test_support_ids_are_almost_all_bytes():
    """28 bytes a token without them, 16 a completion; 4 more for each kept candidate."""
    assert size(completion(0, None)) == 28 * LENGTH + 16
    assert size(completion(0)) == (28 + 4 * TOP_K) * LENGTH + 16
