"""Compare two checkpoints of either format, by tensors and by logits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agrpo_megatron.checkpoint.model_files import architecture
from agrpo_megatron.checkpoint.weights import Weights, open_weights
from agrpo_megatron.config.settings import ModelSettings, Settings
from agrpo_megatron.diffusion.packing import pack
from agrpo_megatron.diffusion.patterns import block_causal
from agrpo_megatron.megatron.network import Network, build_network
from agrpo_megatron.megatron.parallel import start_ranks, stop_ranks
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.megatron.weights import load_named

ROWS, LENGTH = 4, 64  # of the random tokens for the logits


@dataclass(frozen=True)
class Difference:
    """Difference of one tensor, or of the logits, of two checkpoints."""

    name: str
    dtypes: tuple[str, str]
    largest: float  # absolute
    relative: float  # to the largest number of the first


def compare_tensors(
    first: Path, second: Path, progress: Callable[[int, int], Any]
) -> Iterator[Difference]:
    """Yield the difference of every tensor, by its Hugging Face name; one process.

    Raises:
        ValueError: a checkpoint is damaged, or the shapes differ.
    """
    _, ours, theirs = _open_copies(first, second)
    total, done = sum(tensor.nbytes for tensor in ours.tensors.values()), 0
    for name, tensor in ours.tensors.items():
        a, b = ours.part(name)[:], theirs.part(name)[:]
        yield _difference(name, a, b)
        done += tensor.nbytes
        progress(done, total)


def compare_logits(first: Path, second: Path) -> Difference:
    """Return the difference of the logits on random, partly masked rows; one process."""
    model, ours, theirs = _open_copies(first, second)
    assert model.vocab_size is not None
    if model.mask_token_id is None:  # the tokenizer's; any token serves here
        model = replace(model, mask_token_id=model.vocab_size - 1)
    settings = Settings(model=model)
    ranks = start_ranks(settings)
    try:
        a, b = (_logits(build_network(settings, ranks), model, w) for w in (ours, theirs))
    finally:
        stop_ranks()
    return _difference("logits", a, b)


def _logits(network: Network, model: ModelSettings, weights: Weights) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    assert model.vocab_size is not None and model.mask_token_id is not None
    length = min(LENGTH, model.max_sequence_length)
    ids = torch.randint(0, model.vocab_size, (ROWS, length), generator=generator)
    masked = torch.rand(ROWS, length, generator=generator) < torch.linspace(0.1, 0.9, ROWS)[:, None]
    device, lengths = network.ranks.device, torch.full((ROWS,), length)  # drawn on the CPU
    canvas = ids.masked_fill(masked, model.mask_token_id).to(device)
    patterns = [block_causal(length, 1)] * ROWS if model.attention == "causal" else None
    rows = pack(canvas, lengths.to(device), masked.to(device), patterns=patterns)
    load_named(network, model, weights.part)
    (logits,) = forward_rows(network, [rows], lambda _, logits: logits)
    return logits.float().cpu()


def _difference(name: str, ours: Tensor, theirs: Tensor) -> Difference:
    first, second = (str(tensor.dtype).removeprefix("torch.") for tensor in (ours, theirs))
    gap = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
    scale = ours.double().abs().max().item() if ours.numel() else 1.0
    gap = math.inf if math.isnan(gap) else gap
    return Difference(name, (first, second), gap, gap / scale if scale else gap)


def _open_copies(first: Path, second: Path) -> tuple[ModelSettings, Weights, Weights]:
    (model, ours), (other, theirs) = open_weights(first), open_weights(second)
    values, others = architecture(model), architecture(other)
    for name, value in values.items():
        if others[name] != value:
            raise ValueError(
                f"{first} has model.{name}={value} and {second} has {others[name]}; these are not "
                "two copies of one model"
            )
    return model, ours, theirs
