"""A trained model that completes prompts and scores texts, on one rank or on several.

The main rank leads: it sends each job to the other ranks, and all of them do it together.
"""

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings, Settings, SftSettings, TaskSettings
from agrpo_megatron.diffusion.blocks import open_block
from agrpo_megatron.diffusion.sampler import SamplerHooks
from agrpo_megatron.diffusion.sampler_state import SamplerState
from agrpo_megatron.evaluation.open import opened
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import gather_objects
from agrpo_megatron.rollout.generate import sample_prompts
from agrpo_megatron.rollout.session import Run
from agrpo_megatron.runs.resolve import Resolved, resolve
from agrpo_megatron.serving.likelihood import Scoring, score
from agrpo_megatron.serving.texts import stop_in
from agrpo_megatron.trajectories import join, moved, select
from agrpo_megatron.types import Trajectory

# The other ranks wait for the next job; if the main rank dies, gloo's connection to it breaks.
LONGEST_WAIT = datetime.timedelta(days=365)


@dataclass(frozen=True)
class Generation:
    """Prompts to complete with one sampler."""

    prompts: Sequence[Sequence[int]]
    noise: Sequence[int]  # noise index of each
    sampling: SamplingSettings
    stops: Sequence[Sequence[str]]  # texts that end each completion


type Job = Generation | Scoring


class Part(NamedTuple):
    """The finished beginning of a completion."""

    row: int  # of the job
    ids: list[int]
    is_whole: bool


@dataclass(frozen=True)
class Model:
    """A model on this rank."""

    run: Run
    network: Network
    control: dist.ProcessGroup | None  # all ranks, over gloo; None: one rank

    @property
    def settings(self) -> Settings:
        """Return the settings, whose `evaluation` is the sampler's default."""
        return self.run.settings


def resolved_model(settings: Settings, *, world_size: int) -> Resolved:
    """Resolve the settings of a model without its task, whose data may be elsewhere.

    Raises:
        ValueError: a setting is wrong.
    """
    settings = replace(
        settings,
        task=TaskSettings(),
        sft=SftSettings(),
        # These name problems and metrics of the training run.
        evaluation=replace(settings.evaluation, few_shot=0),
        checkpoint=replace(settings.checkpoint, best=None),
        train=replace(settings.train, stop_metric=None, stop_target=None, stop_patience=None),
    )
    return resolve(settings, world_size=world_size, needs=None)


@contextmanager
def open_model(resolved: Resolved, checkpoint: Path | None) -> Iterator[Model]:
    """Yield a model; called by every rank.

    Args:
        checkpoint: of a run; None takes the weights that `model.load` names.
    """
    with opened(resolved, checkpoint) as (session, network):
        control = None
        if network.ranks.world_size > 1:
            control = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
            assert isinstance(control, dist.ProcessGroup)
        yield Model(session.run, network, control)


@contextmanager
def leading(model: Model) -> Iterator[None]:
    """Let the other ranks go at the end; the main rank runs its work in here."""
    yield
    _sent(model, None)


def follow(model: Model) -> None:
    """Do the jobs that the main rank sends, until it ends; called by all other ranks."""
    while (job := _sent(model, None)) is not None:
        perform(model, job)


def lead(model: Model, job: Job, emit: Callable[[Part], Any] | None = None):
    """Do a job together with the other ranks; called by the main rank.

    Args:
        emit: receives the finished beginnings of completions that this rank's replica samples.
    """
    _sent(model, job)
    return perform(model, job, emit)


def perform(model: Model, job: Job, emit: Callable[[Part], Any] | None = None) -> Any:
    """Do a job: a `Trajectory` on the CPU, or scores; called by every rank."""
    if isinstance(job, Scoring):
        return score(model.run, model.network, job)
    return _generated(model, job, emit)


def _sent(model: Model, job: Any) -> Any:
    """Return what the main rank sends."""
    if model.control is None:
        return job
    shared = [job]
    dist.broadcast_object_list(shared, src=0, group=model.control)
    return shared[0]


def _generated(
    model: Model, job: Generation, emit: Callable[[Part], Any] | None
) -> Trajectory | None:
    """Sample the completions; replicas share them. Only the main rank gets all."""
    data, device = model.network.ranks.data, model.network.ranks.device
    places = list(range(len(job.prompts)))[data.rank :: data.size]
    prompts = [torch.tensor(job.prompts[p], dtype=torch.int64, device=device) for p in places]
    noise = torch.tensor([job.noise[p] for p in places], dtype=torch.int64, device=device)
    mine = _Blocks(model, job, places, emit)
    hooks = SamplerHooks(on_complete=mine.on_complete, on_step=mine.on_step)
    trajectory, _ = sample_prompts(
        model.run, model.network, prompts, noise, sampling=job.sampling, hooks=hooks
    )
    part = None
    if model.network.ranks.speaks_for_replica:
        part = places, moved(trajectory, "cpu")
    if model.control is None:
        return moved(trajectory, "cpu")
    parts = [part for part in gather_objects(part, model.control) if part is not None]
    order = torch.tensor([place for places, _ in parts for place in places]).argsort()
    return select(join([trajectory for _, trajectory in parts]), order)


class _Blocks:
    """Follows the blocks of rows: emits them, and ends rows that have written a stop text."""

    def __init__(
        self,
        model: Model,
        job: Generation,
        places: Sequence[int],
        emit: Callable[[Part], Any] | None,
    ):
        self._tokenizer, self._job = model.run.tokenizer, job
        self._places, self._emit = places, emit
        self._opened = [0] * len(places)

    def on_step(self, state: SamplerState, rows: list[int]) -> list[int]:
        """Look at rows whose block has ended; return those that end with it."""
        ended = []
        for row in rows:
            block, place = state.opened[row], self._places[row]
            stops = self._job.stops[place]
            if block == self._opened[row] or not (stops or self._emit):
                continue
            self._opened[row] = block
            prompt, length = len(self._job.prompts[place]), self._job.sampling.completion_length
            done = min(length, open_block(prompt, block, self._job.sampling)[0] - prompt)
            columns: Tensor = state.columns[row, :done]
            ids = state.canvas[row, columns].tolist()
            if stop_in(self._tokenizer.decode(ids), stops) is not None:
                ended.append(row)
            if self._emit is not None:
                self._emit(Part(place, ids, is_whole=False))
        return ended

    def on_complete(self, rows: list[int], part: Trajectory) -> None:
        """Emit complete rows."""
        if self._emit is not None:
            for row, ids in zip(rows, part.tokens.tolist(), strict=True):
                self._emit(Part(self._places[row], ids, is_whole=True))
