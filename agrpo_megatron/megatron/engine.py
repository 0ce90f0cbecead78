"""A trainable model: network, data parallelism, optimizer and schedule, all from Megatron."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
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
from agrpo_megatron.megatron.memory.release import Release
from agrpo_megatron.megatron.network import Network, build_network
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.megatron.platform import use_torch_optimizers
from agrpo_megatron.megatron.records import megatron_record
from agrpo_megatron.megatron.reshard import RolloutCopy

# State dtypes of Transformer Engine's Adam; it scales the FP8 states.
STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}
# The largest factor that an FP8 moment is scaled by: it stores 1e-28 still, and moments that small
# move no weight.
LARGEST_SCALE = 2.0**100


@dataclass(frozen=True)
class Engine:
    """Everything that a training loop drives; parts are mutable, the record is frozen."""

    network: Network
    ddp: list[DistributedDataParallel]  # one per virtual stage
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    release: Release  # of memory that rollouts do not need
    rollout_copy: RolloutCopy | None = None  # if rollouts have a separate layout

    @property
    def ranks(self) -> Ranks:
        """Return the training layout."""
        return self.network.ranks

    @property
    def optimizers(self) -> list[Any]:
        """Return Megatron's optimizers; each wraps the optimizer that does the arithmetic."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def rollout_network(self) -> Network:
        """Return the network that samples, with the latest weights; called by every rank."""
        self.finish_parameters()
        if self.rollout_copy is None:
            return self.network
        return self.rollout_copy.update(self.network, self.scheduler.num_steps)

    @contextmanager
    def sampling(self) -> Iterator[Network]:
        """Yield the network that samples, as `rollout_network` does; called by every rank.

        While the body runs, `rollout.release` frees memory that only updates and saves need.
        """
        network, weights = self.rollout_network(), self.network.named_parameters()
        with self.release(self.ddp, self.optimizers, kept=[weight for _, weight in weights]):
            yield network

    def init_main_weights(self, uncast: dict[str, Tensor]) -> None:
        """Initialise the main weights from the network's; called by every rank.

        Args:
            uncast: by name, the values of FP8 weights before their cast.
        """
        if not uncast or self.network.adapters is not None:
            self.optimizer.reload_model_params()
            return
        values = {p: uncast.get(name, p) for name, p in self.network.named_parameters()}
        state = {
            f"model{number}": {name: values[p] for name, p in chunk.named_parameters()}
            for number, chunk in enumerate(self.network.chunks)
        }
        self.optimizer.reload_model_params(state_dict=state)

    def cast_weights(self) -> None:
        """Cast FP8 primary weights from the main weights; called by every rank."""
        if not self.network.config.fp8_param:
            return
        for part in self.optimizers:
            if _gathers_in_gradients(self.network.config):
                part._copy_main_params_to_param_buffer()
            else:
                part._copy_main_params_to_model_params()
        for ddp in self.ddp:
            ddp.start_param_sync(force_sync=True)

    def finish_parameters(self) -> None:
        """Finish the all-gather of updated weights (`ddp.overlap_param_gather`)."""
        for ddp in self.ddp:
            if ddp.ddp_config.overlap_param_gather:
                ddp.start_param_sync(force_sync=True)


def build_engine(
    settings: Settings, optimizer: OptimizerSettings, *, iterations: int, ranks: Ranks
) -> Engine:
    """Build model and optimizer; called by every rank. Weights are loaded afterwards.

    Frees an unreferenced earlier engine first: two would not fit into memory.

    Args:
        optimizer: the phase's optimizer settings.
        iterations: optimizer steps that the learning-rate schedule spans.

    Raises:
        ValueError: Megatron refuses a pass-through setting.
    """
    for _ in range(2):  # FP8 weights are freed only after their owner
        gc.collect()
    if kernels_for(settings).optimizer == "torch":
        use_torch_optimizers()
    network = build_network(settings, ranks)
    config = network.config
    data_parallel = ddp_config(settings.ddp, optimizer, config)
    ddp: list[Any] = [
        DistributedDataParallel(config, data_parallel, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(network.chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if data_parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([part.no_sync for part in ddp])
    if data_parallel.overlap_param_gather and data_parallel.align_param_gather:
        config.param_sync_func = _one_or_all([part.start_param_sync for part in ddp])
    built = get_megatron_optimizer(optimizer_config(optimizer, config), ddp)
    config.grad_scale_func = built.scale_loss
    rollout = ranks.rollout_layout
    copy = RolloutCopy(build_network(settings, rollout)) if rollout is not None else None
    release = Release(settings.rollout.release)
    engine = Engine(network, ddp, built, _scheduler(built, optimizer, iterations), release, copy)
    if optimizer.moments == "fp8":
        for part in engine.optimizers:
            part.optimizer._apply_scale = partial(_scale_finitely, part.optimizer._apply_scale)
    return engine


def build_reference(settings: Settings, network: Network) -> Network:
    """Return the frozen reference of a network; called by every rank.

    With adapters it is the same network, which leaves them out; else a second one without weights.
    """
    if network.adapters is not None:
        return replace(network, is_reference=True)
    return build_network(settings, network.ranks)


def _scale_finitely(
    apply_scale: Callable[..., None], name: str, values: Tensor, stored: Any, scale: Tensor
) -> None:
    """Store a moment as Transformer Engine's Adam does, and zeros as zeros; mutates `stored`.

    Without a gradient so far, in this rank's part of a tensor, the moment is zero. The optimizer
    scales it by the inverse of its largest value: 0 * inf is NaN, and so is the next weight.
    """
    apply_scale(name, values, stored, scale)
    quantizer = getattr(stored, "_quantizer", None)
    if quantizer is not None:
        quantizer.scale.abs_().clamp_(max=LARGEST_SCALE)  # zeros may be -0.0, and their scale -inf
        stored.copy_(values)


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def ddp_config(
    chosen: dict[str, Any], optimizer: OptimizerSettings, config: TransformerConfig
) -> DistributedDataParallelConfig:
    """Translate a phase's settings into Megatron's; `ddp` overrides.

    Raises:
        ValueError: Megatron refuses a value or does not know a key of `ddp`.
    """
    values = {
        "use_distributed_optimizer": optimizer.distributed,
        "grad_reduce_in_fp32": config.bf16 and optimizer.main_gradients == "fp32",
        "fp8_param_gather": config.fp8_param,
        "reuse_grad_buf_for_mxfp8_param_ag": _gathers_in_gradients(config),
    }
    return megatron_record(DistributedDataParallelConfig, values, chosen, key="ddp")


def optimizer_config(
    optimizer: OptimizerSettings, config: TransformerConfig, *, key: str = "optimizer"
) -> OptimizerConfig:
    """Translate a phase's settings into Megatron's; `optimizer.megatron` overrides.

    Args:
        key: the section that holds `optimizer`.

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
    return megatron_record(OptimizerConfig, values, optimizer.megatron, key=f"{key}.megatron")


def _state_values(optimizer: OptimizerSettings, config: TransformerConfig) -> dict[str, Any]:
    """Return the values that set dtype and device of the optimizer's states."""
    is_offloaded, has_gpu = optimizer.offload > 0, torch.cuda.is_available()
    is_plain = (optimizer.moments, optimizer.main_gradients) == ("fp32", "fp32")
    # The second moment spans more orders of magnitude than FP8 with one scale does, and Adam
    # divides by its root: a rounded-off zero would blow up. (Source: FP8-LM, arXiv 2310.18313.)
    second = "bf16" if optimizer.moments == "fp8" else optimizer.moments
    return {
        # Offloading uses the same path; Megatron's launcher requires it too.
        "use_precision_aware_optimizer": is_offloaded or not is_plain,
        "main_grads_dtype": STATES[optimizer.main_gradients],
        "exp_avg_dtype": STATES[optimizer.moments],
        "exp_avg_sq_dtype": STATES[second],
        # Only FP8 primary weights need their recipe.
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
    """Whether updated weights are gathered in the gradient buffer.

    An MXFP8 weight has two casts, row-wise and column-wise, and neither can be computed from the
    other: weights are gathered in bf16 and cast on the receiving rank.
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
        # A run may resume with another schedule: a checkpoint gives only the steps so far.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
