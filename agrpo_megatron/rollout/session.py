"""What the loops share: settings, ranks, task, tokenizer and log; and how a network samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings, Settings
from agrpo_megatron.diffusion.sampler import SamplerContext, sample
from agrpo_megatron.diffusion.snapshot import NEVER, Interruption
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.megatron.pipeline import RolloutForward, make_forward
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.resilience.stop import Stop
from agrpo_megatron.resilience.stragglers import Stragglers
from agrpo_megatron.rollout.cache import RolloutBank
from agrpo_megatron.runs.log import RunLog
from agrpo_megatron.tasks import Task
from agrpo_megatron.tasks.grading import Grader
from agrpo_megatron.text.tokenizer import Tokenizer
from agrpo_megatron.types import Prompt, Trajectory

EVALUATION_IDS = 1 << 40  # noise indices of evaluation, far from those of training


class View(Protocol):
    """What shows a run while it runs; the terminal view is one."""

    def sft(self, metrics: dict) -> None:
        """Show one supervised iteration."""

    def rl(self, metrics: dict) -> None:
        """Show one reinforcement-learning iteration."""

    def evaluation(self, metrics: dict) -> None:
        """Show one evaluation."""

    def note(self, text: str) -> None:
        """Say something."""

    def warn(self, text: str) -> None:
        """Say something alarming."""


@dataclass(frozen=True)
class Session:
    """One run on this rank."""

    settings: Settings
    ranks: Ranks
    task: Task
    tokenizer: Tokenizer
    log: RunLog
    view: View
    grader: Grader
    bank: RolloutBank | None = None  # of a training run
    sections: Sections = field(default_factory=Sections)
    stop: Stop = field(default_factory=lambda: Stop(Sections()))

    @property
    def mask_id(self) -> int:
        """Return the mask token's id."""
        assert self.settings.model.mask_token_id is not None
        return self.settings.model.mask_token_id

    @property
    def eos_id(self) -> int:
        """Return the end-of-text id."""
        assert self.settings.model.eos_token_id is not None
        return self.settings.model.eos_token_id


def compare_ranks(session: Session, stragglers: Stragglers) -> dict[str, float]:
    """Return how the ranks' times compare, as metrics; warns of one that stays slow."""
    if session.ranks.world_size == 1:
        return {}
    metrics, warnings = stragglers.report(session.sections.take(), session.ranks)
    for warning in warnings:
        session.view.warn(warning)
    return metrics


def encode_prompts(session: Session, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Return the ids of each prompt, int64."""
    device, encode = session.ranks.device, session.tokenizer.encode_prompt
    return [torch.tensor(encode(prompt), dtype=torch.int64, device=device) for prompt in prompts]


def sample_prompts(
    session: Session,
    network: Network,
    prompts: Sequence[Tensor],
    rollout_ids: Tensor,
    *,
    sampling: SamplingSettings,
    weights_version: int = 0,
    ended: Callable[[list[int], Tensor], None] | None = None,
    interruption: Interruption = NEVER,
) -> tuple[Trajectory, RolloutForward]:
    """Sample one completion per prompt, and return what counted the work beside them.

    Called by every rank of a replica with the same prompts.

    Args:
        ended: as `diffusion.sampler.sample` takes it; ranks may differ in it.
        interruption: likewise, but the same on all ranks.
    """
    forward = make_forward(network, session.settings.rollout)
    context = SamplerContext(
        forward=forward,
        vocab=network.vocab,
        mask_id=session.mask_id,
        eos_id=session.eos_id,
        seed=session.settings.run.seed,
        token_budget=session.settings.train.token_budget,
        shift=session.settings.model.shift,
        most_rows=session.settings.rollout.rows,
    )
    trajectory = sample(
        prompts,
        rollout_ids,
        context=context,
        sampling=sampling,
        weights_version=weights_version,
        ended=ended,
        interruption=interruption,
    )
    return trajectory, forward
