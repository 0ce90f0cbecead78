"""A model that trains: network, data parallelism, optimizer and schedule, all Megatron's."""

import gc
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
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from agrpo_megatron.config.settings import OptimizerSettings, Settings
from agrpo_megatron.hardware.kernels import kernels_for
from agrpo_megatron.megatron.network import Network, build_network
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.megatron.platform import use_torch_optimizers
from agrpo_megatron.megatron.reshard import RolloutCopy

# What Transformer Engine's Adam calls the dtypes of its states; it scales what it keeps as FP8.
STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


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

    def begin(self, given: dict[str, Tensor]) -> None:
        """Let the main weights begin from the network's; called by every rank.

        Args:
            given: by name, what weights that are kept in FP8 were cast from.
        """
        if not given:
            self.optimizer.reload_model_params()
            return
        values = {p: given.get(name, p) for name, p in self.network.named_parameters()}
        state = {
            f"model{number}": {name: values[p] for name, p in chunk.named_parameters()}
            for number, chunk in enumerate(self.network.chunks)
        }
        self.optimizer.reload_model_params(state_dict=state)

    def cast_weights(self) -> None:
        """Cast weights that are kept in FP8 from the main weights; called by every rank."""
        if not self.network.config.fp8_param:
            return
        optimizer: Any = self.optimizer
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if _gathers_in_gradients(self.network.config):
                part._copy_main_params_to_param_buffer()
            else:
                part._copy_main_params_to_model_params()
        for ddp in self.ddp:
            ddp.start_param_sync(force_sync=True)

    def finish_parameters(self) -> None:
        """Wait for updated weights that are still being gathered (`ddp.overlap_param_gather`)."""
        for ddp in self.ddp:
            if ddp.ddp_config.overlap_param_gather:
                ddp.start_param_sync(force_sync=True)


def build_engine(
    settings: Settings, optimizer: OptimizerSettings, *, iterations: int, ranks: Ranks
) -> Engine:
    """Build model and optimizer; called by every rank. Weights are loaded afterwards.

    An engine that nobody refers to any more is gone before: two would not fit into memory.

    Args:
        optimizer: the phase's optimizer settings.
        iterations: optimizer steps that the learning-rate schedule spans.

    Raises:
        ValueError: Megatron refuses a pass-through setting.
    """
    for _ in range(2):  # weights in FP8 are free only once what holds them is
        gc.collect()
    if kernels_for(settings).optimizer == "torch":
        use_torch_optimizers()
    network = build_network(settings, ranks)
    config = network.config
    ddp_config = _ddp_config(settings.ddp, optimizer, config)
    ddp: list[Any] = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(network.chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([part.no_sync for part in ddp])
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        config.param_sync_func = _one_or_all([part.start_param_sync for part in ddp])
    built = get_megatron_optimizer(optimizer_config(optimizer, config), ddp)
    config.grad_scale_func = built.scale_loss
    copy = None
    if ranks.rollout_layout is not None:
        copy = RolloutCopy(build_network(settings, ranks.rollout_layout))
    return Engine(network, ddp, built, _scheduler(built, optimizer, iterations), copy)


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def _ddp_config(
    chosen: dict[str, Any], optimizer: OptimizerSettings, config: TransformerConfig
) -> DistributedDataParallelConfig:
    values = {
        "use_distributed_optimizer": optimizer.distributed,
        "grad_reduce_in_fp32": config.bf16 and optimizer.main_gradients == "fp32",
        "fp8_param_gather": config.fp8_param,
        "reuse_grad_buf_for_mxfp8_param_ag": _gathers_in_gradients(config),
        **chosen,
    }
    return _megatron_record(DistributedDataParallelConfig, values, "ddp")


def optimizer_config(optimizer: OptimizerSettings, config: TransformerConfig) -> OptimizerConfig:
    """Translate a phase's settings into Megatron's own; `optimizer.megatron` wins.

    Raises:
        ValueError: Megatron refuses a value or does not know a key of `optimizer.megatron`.
    """
    values = {
        "bf16": config.bf16,
        "params_dtype": config.params_dtype,
        "optimizer": "adam",
        "lr": optimizer.learning_rate,
        "min_lr": optimizer.min_learning_rate,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "clip_grad": optimizer.clip_grad,
        "use_distributed_optimizer": optimizer.distributed,
        **_state_values(optimizer, config),
    }
    return _megatron_record(OptimizerConfig, {**values, **optimizer.megatron}, "optimizer.megatron")


def _state_values(optimizer: OptimizerSettings, config: TransformerConfig) -> dict[str, Any]:
    """Return what decides the form of the optimizer's states, and where they are kept."""
    is_offloaded, has_gpu = optimizer.offload > 0, torch.cuda.is_available()
    is_plain = (optimizer.moments, optimizer.main_gradients) == ("fp32", "fp32")
    # The second moment spans more orders of magnitude than FP8 with one scale does, and Adam
    # divides by its root: what became zero would blow up. (Source: FP8-LM, arXiv 2310.18313.)
    second = "bf16" if optimizer.moments == "fp8" else optimizer.moments
    return {
        # Offloading runs on the same path, and Megatron's own launcher demands it too.
        "use_precision_aware_optimizer": is_offloaded or not is_plain,
        "main_grads_dtype": STATES[optimizer.main_gradients],
        "exp_avg_dtype": STATES[optimizer.moments],
        "exp_avg_sq_dtype": STATES[second],
        # Only weights that are kept in FP8 need to be treated by their recipe.
        "fp8_recipe": config.fp8_recipe if config.fp8_param else None,
        "store_param_remainders": not config.fp8_param,
        "reuse_grad_buf_for_mxfp8_param_ag": _gathers_in_gradients(config),
        "optimizer_cpu_offload": is_offloaded,
        "optimizer_offload_fraction": optimizer.offload,
        "overlap_cpu_optimizer_d2h_h2d": is_offloaded,
        "pin_cpu_grads": has_gpu,
        "pin_cpu_params": has_gpu,
    }


def _gathers_in_gradients(config: TransformerConfig) -> bool:
    """Say whether updated weights are gathered in the place of gradients, for want of their own.

    MXFP8 weights have two sets of bytes, neither of which can be made from the other: they travel
    in bf16 and are cast where they arrive.
    """
    return config.fp8_param and config.fp8_recipe == "mxfp8"


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
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{key}: Megatron refuses it: {error}") from None
