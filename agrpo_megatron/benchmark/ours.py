"""What is measured of ours: rollouts and updates as a run computes them, with made-up rewards."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo_megatron.benchmark.plan import Plan
from agrpo_megatron.checkpoint.start import load_start_weights
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.estimators.objective import BatchLoss
from agrpo_megatron.estimators.update import make_rollout
from agrpo_megatron.megatron.engine import Engine, build_engine
from agrpo_megatron.megatron.forward import RolloutForward
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.rollout.sampling import sample_ids
from agrpo_megatron.training.step import accumulate_gradients, drop_gradients, optimizer_step
from agrpo_megatron.training.update import Part, prepare, with_loss, with_old_logprobs
from agrpo_megatron.types import Rollout, Trajectory

ITERATIONS = 1000  # that the schedule of the learning rate spans
RESERVED = 2  # ids that no prompt has, at the vocabulary's end


@dataclass(frozen=True)
class Ours:
    """An engine with weights, and the prompts that it completes."""

    plan: Plan
    engine: Engine
    prompts: Tensor  # [B, P] ids
    rollout_ids: Tensor  # [B]

    @property
    def settings(self) -> Settings:
        """Return the settings of the plan."""
        return self.plan.settings

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.engine.ranks.device


def open_ours(plan: Plan) -> Ours:
    """Start the one rank, build an engine and fill it with the weights of the plan.

    `megatron.parallel.stop_ranks` ends the rank.
    """
    settings = plan.settings
    ranks = start_ranks(settings)
    engine = build_engine(settings, settings.optimizer, iterations=ITERATIONS, ranks=ranks)
    engine.init_main_weights(load_start_weights(engine.network, settings))
    generator = torch.Generator().manual_seed(settings.run.seed)
    assert settings.model.vocab_size is not None
    shape, most = (plan.batch, plan.prompt_length), settings.model.vocab_size - RESERVED
    prompts = torch.randint(0, most, shape, generator=generator)
    return Ours(plan, engine, prompts.to(ranks.device), torch.arange(plan.batch).to(ranks.device))


def sample(ours: Ours) -> tuple[Trajectory, RolloutForward]:
    """Complete the prompts, the same way each time; also return the forward, which counts."""
    settings, prompts = ours.settings, list(ours.prompts)
    with ours.engine.sampling() as network:
        return sample_ids(
            settings, network, prompts, ours.rollout_ids, sampling=settings.sampling, stop_ids=()
        )


def rewarded(ours: Ours, trajectory: Trajectory) -> Rollout:
    """Return the completions with rewards, of which the plan's share gives no advantage."""
    rewards = made_up_rewards(ours.plan.batch, ours.plan.zero_rollouts)
    return make_rollout(trajectory, rewards, ours.settings.algorithm)


def made_up_rewards(count: int, zeros: int) -> list[float]:
    """Return rewards [count] whose mean is exactly 0.5, which the first `zeros` of them equal.

    The others differ from it, and are not 1 in number.
    """
    others = count - zeros
    gains = [0.5 if number % 2 else -0.5 for number in range(others)]
    if others % 2:
        gains[-3:] = [0.5, 0.5, -1.0]
    return [0.5] * zeros + [0.5 + gain for gain in gains]


def prepared(ours: Ours, rollout: Rollout) -> tuple[Part, BatchLoss]:
    """Return what an update scores, in micro-batches, and their loss."""
    engine, settings = ours.engine, ours.settings
    part = prepare(settings, engine.ranks, rollout, seed=settings.run.seed)
    part = with_old_logprobs(engine.network, part, settings, is_first=True)
    return with_loss(engine, part, rollout, settings, is_first=True)


def update(ours: Ours, rollout: Rollout) -> Part:
    """Update the weights on rollouts; returns what was scored."""
    part, loss = prepared(ours, rollout)
    optimizer_step(ours.engine, part.batches, loss=loss, examples=len(rollout.rewards))
    return part


def gradient(ours: Ours, rollout: Rollout, part: Part, loss: BatchLoss) -> dict[str, Tensor]:
    """Return the gradient of an update by Hugging Face's names; the weights do not change."""
    engine = ours.engine
    accumulate_gradients(engine, part.batches, loss=loss, examples=len(rollout.rewards))
    grads = {name: p.main_grad for name, p in engine.network.trained_parameters()}  # type: ignore[attr-defined]
    found = export_hf(grads, ours.settings.model, engine.ranks)
    found = {name: grad.clone() for name, grad in found.items()}
    drop_gradients(engine)
    return found


def weights(ours: Ours) -> dict[str, Tensor]:
    """Return copies of the weights by Hugging Face's names."""
    mine = {name: weight.detach() for name, weight in ours.engine.network.named_weights()}
    found = export_hf(mine, ours.settings.model, ours.engine.ranks)
    return {name: weight.clone() for name, weight in found.items()}
