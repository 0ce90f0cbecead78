"""A model that trains: network, data parallelism, optimizer and schedule, all Megatron's."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.megatron.model import MaskedDiffusionModel, build_model
from agrpo_megatron.megatron.ranks import Ranks
from agrpo_megatron.settings import OptimizerSettings, Settings
from agrpo_megatron.types import PackedRows


@dataclass(frozen=True)
class Engine:
    """Everything that a training loop drives; the parts are mutable, the record is not."""

    ranks: Ranks
    network: MaskedDiffusionModel
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def build_engine(
    settings: Settings, optimizer: OptimizerSettings, *, iterations: int, ranks: Ranks
) -> Engine:
    """Build model and optimizer; called by every rank. Weights are loaded afterwards.

    Args:
        optimizer: the phase's optimizer settings.
        iterations: optimizer steps that the learning-rate schedule spans.

    Raises:
        ValueError: Megatron refuses a pass-through setting.
    """
    network = build_model(settings.model, settings.parallel)
    ddp_values = {"use_distributed_optimizer": optimizer.distributed, **settings.ddp}
    ddp_config = _megatron_record(DistributedDataParallelConfig, ddp_values, "ddp")
    ddp = DistributedDataParallel(network.config, ddp_config, network)
    config = network.config
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = ddp.no_sync
    built = get_megatron_optimizer(_optimizer_config(optimizer), [ddp])
    config.grad_scale_func = built.scale_loss
    return Engine(ranks, network, ddp, built, _scheduler(built, optimizer, iterations))


def model_vocabulary(settings: Settings, ranks: Ranks) -> Vocabulary:
    """Describe this rank's logits columns for the sampler and the scorer."""
    model = settings.model
    assert model.vocab_size is not None and model.mask_token_id is not None
    width = -(-model.vocab_size // ranks.tensor_size)
    return Vocabulary(
        size=model.vocab_size,
        start=ranks.tensor_rank * width,
        forbidden=(model.mask_token_id,) if settings.sampling.forbid_mask_token else (),
        group=ranks.tensor_group,
    )


@torch.no_grad()
def score_rows(network: MaskedDiffusionModel, rows: PackedRows) -> Tensor:
    """Return the logits shard [S, V / tensor parallel] of packed rows, without a graph."""
    return network(rows)


def _optimizer_config(optimizer: OptimizerSettings) -> OptimizerConfig:
    values = {
        "optimizer": "adam",
        "lr": optimizer.learning_rate,
        "min_lr": optimizer.min_learning_rate,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "clip_grad": optimizer.clip_grad,
        "use_distributed_optimizer": optimizer.distributed,
    }
    return _megatron_record(OptimizerConfig, {**values, **optimizer.megatron}, "optimizer.megatron")


def _scheduler(
    built: MegatronOptimizer, optimizer: OptimizerSettings, iterations: int
) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        built,
        init_lr=0.0,
        max_lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        lr_warmup_steps=min(optimizer.warmup_iterations, max(0, iterations - 1)),
        lr_decay_steps=max(1, iterations),
        lr_decay_style=optimizer.decay,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=max(1, iterations),
        wd_incr_style="constant",
    )


def _megatron_record(cls: Any, values: dict[str, Any], key: str) -> Any:
    try:
        return cls(**values)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{key}: Megatron refuses it: {error}") from None
