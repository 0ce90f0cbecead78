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

from agrpo_megatron.megatron.network import Network, build_network
from agrpo_megatron.megatron.ranks import Ranks
from agrpo_megatron.megatron.reshard import RolloutCopy
from agrpo_megatron.settings import OptimizerSettings, Settings


@dataclass(frozen=True)
class Engine:
    """Everything that a training loop drives; the parts are mutable, the record is not."""

    network: Network
    ddp: list[DistributedDataParallel]  # one per virtual stage
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    rollout_copy: RolloutCopy | None = None  # where rollouts have a layout of their own

    @property
    def ranks(self) -> Ranks:
        """Return the layout of the training."""
        return self.network.ranks

    def rollout_network(self) -> Network:
        """Return the network that samples, with the latest weights; called by every rank."""
        self.finish_parameters()
        if self.rollout_copy is None:
            return self.network
        return self.rollout_copy.update(self.network, self.scheduler.num_steps)

    def finish_parameters(self) -> None:
        """Wait for updated weights that are still being gathered (`ddp.overlap_param_gather`)."""
        for ddp in self.ddp:
            if ddp.ddp_config.overlap_param_gather:
                ddp.start_param_sync(force_sync=True)


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
    network = build_network(settings, ranks)
    config, is_bf16 = network.config, settings.precision == "bf16"
    ddp_values = {
        "use_distributed_optimizer": optimizer.distributed,
        "grad_reduce_in_fp32": is_bf16,
        **settings.ddp,
    }
    ddp_config = _megatron_record(DistributedDataParallelConfig, ddp_values, "ddp")
    ddp: list[Any] = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(network.chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([part.no_sync for part in ddp])
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        config.param_sync_func = _one_or_all([part.start_param_sync for part in ddp])
    built = get_megatron_optimizer(_optimizer_config(optimizer, is_bf16=is_bf16), ddp)
    config.grad_scale_func = built.scale_loss
    copy = None
    if ranks.rollout_layout is not None:
        copy = RolloutCopy(build_network(settings, ranks.rollout_layout))
    return Engine(network, ddp, built, _scheduler(built, optimizer, iterations), copy)


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def _optimizer_config(optimizer: OptimizerSettings, *, is_bf16: bool) -> OptimizerConfig:
    values = {
        "bf16": is_bf16,
        "params_dtype": torch.bfloat16 if is_bf16 else torch.float32,
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
