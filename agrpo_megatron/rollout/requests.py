"""Completions that are asked for, and the part of them that each replica samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.rollout.session import Run, Safety
from agrpo_megatron.tasks.base import Split, task_prompts
from agrpo_megatron.trajectories import select
from agrpo_megatron.types import Problem, Prompt, Trajectory


@dataclass(frozen=True)
class Request:
    """R completions to sample and grade; the same on every rank."""

    problems: Sequence[Problem]  # one for each completion
    rollout_ids: Tensor  # [R]
    sampling: SamplingSettings
    split: Split = "train"  # prompts and rewards of training, or of evaluation
    weights_version: int = 0
    name: str = ""  # in the rollout cache; empty: no caching
    # Digest of the run whose completions of that name count; None: of this run.
    cached_by: str | None = None
    is_ahead: bool = False  # an update comes before the rewards: completions are written at once
    # Receives on each rank how many of its replica's rows took a denoising step.
    on_step: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Share:
    """A replica's part of a request: cached completions, and completions to sample."""

    cached: Trajectory | None
    places: list[int]  # in the request: of the cached completions, then of those to sample
    prompts: list[Tensor]  # of the completions to sample
    rollout_ids: Tensor  # likewise


def encode_prompts(run: Run, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Return the ids of each prompt, int64."""
    encoded, device = run.tokenizer.encode_prompts(prompts), run.ranks.device
    return [torch.tensor(ids, dtype=torch.int64, device=device) for ids in encoded]


def share_of(run: Run, safety: Safety, network: Network, request: Request) -> Share:
    """Divide cached and missing completions among the replicas, long prompts first."""
    data, ids = network.ranks.data, request.rollout_ids
    prompts = encode_prompts(run, task_prompts(run.task, request.problems, split=request.split))
    cached = None
    if request.name:
        cached = safety.cache.find_completions(
            request.name, ids, sampling=request.sampling, run=request.cached_by
        )
    known = set(cached.rollout_ids.tolist()) if cached is not None else set()
    numbers = list(enumerate(ids.tolist()))
    there = [place for place, number in numbers if number in known]
    missing = [place for place, number in numbers if number not in known]
    by_length = sorted(missing, key=lambda place: -len(prompts[place]))
    mine = by_length[data.rank :: data.size]
    if cached is not None:
        rows = torch.arange(len(there), device=ids.device)
        cached = select(cached, rows[data.rank :: data.size])
    return Share(
        cached,
        there[data.rank :: data.size] + mine,
        [prompts[place] for place in mine],
        ids[torch.tensor(mine, dtype=torch.int64, device=ids.device)],
    )
