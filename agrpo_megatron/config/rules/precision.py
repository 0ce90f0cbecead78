"""Rules of precision, kernels and optimizers that need settings only.

`hardware/kernels` has the rules of the machine. Imports neither torch nor Megatron.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from agrpo_megatron.config.settings import (
    Fp8Settings,
    KernelSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RolloutSettings,
    Settings,
)
from agrpo_megatron.config.values import text

# bf16 rounds by at most 2**-8 of a number: with 1 - beta2 below it, a second moment without new
# gradients would never shrink.
BF16_BETA2 = 0.996
# Settings that have another name in Megatron.
RENAMED = {"layernorm_epsilon": "norm_epsilon", "add_qkv_bias": "qkv_bias", "lr": "learning_rate"}
RENAMED |= {"qk_layernorm": "qk_norm", "init_method_std": "init_std", "min_lr": "min_learning_rate"}
RENAMED |= {"use_distributed_optimizer": "distributed", "kv_channels": "head_dim"}

type Layouts = list[tuple[str, ParallelSettings]]


def validate_precision(settings: Settings) -> None:
    """Check the rules; rules on the architecture only once it is known.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    precision, fp8, kernels = settings.precision, settings.fp8, settings.kernels
    layouts = _layouts(settings)
    used = optimizers(settings, trained_phases(settings))
    every = optimizers(settings, ("sft", "rl"))
    problem = (
        _passed_misfit({"model": settings.model, **every})
        or _rates_misfit(every)
        or _fp8_misfit(precision, fp8, has_rl=settings.train.iterations > 0)
        or _spec_misfit(precision, kernels)
        or (kernels.batch_invariant and _batch_invariant_misfit(precision, layouts))
        or (kernels.cuda_graphs and _graphs_misfit(layouts))
        or _optimizer_misfit(precision, used)
        or (fp8.primary_weights and _primary_weights_misfit(settings.rollout, used))
        or (precision == "fp8" and _bf16_layers_misfit(fp8, settings.model, layouts))
    )
    if problem:
        raise ValueError(problem)
    if precision == "fp8":
        validate_recipe(settings, fp8.recipe)


def validate_recipe(settings: Settings, recipe: str | None) -> None:
    """Check the needs of a recipe: divisible widths, and how FP8 weights are gathered.

    Raises:
        ValueError: the first rule broken.
    """
    is_primary, overlaps = settings.fp8.primary_weights, settings.ddp.get("overlap_param_gather")
    if recipe == "mxfp8" and is_primary and overlaps:
        raise ValueError(
            "ddp.overlap_param_gather=true: mxfp8 weights are gathered in the gradient "
            "buffer, so all of them before the next forward; use ddp.overlap_param_gather=false "
            "or fp8.primary_weights=false"
        )
    if not settings.model.is_known:
        return
    multiple = 32 if recipe == "mxfp8" else 16
    for key, parallel in _layouts(settings):
        for what, width in _widths(settings.model, parallel, key).items():
            if width % multiple:
                raise ValueError(
                    f"precision=fp8 needs widths divisible by {multiple}, and {what} is {width}; "
                    "use a smaller tensor-parallel size, other widths, or precision=bf16"
                )


def trained_phases(settings: Settings) -> tuple[str, ...]:
    """Return the phases that a run has: sft, rl."""
    is_on = {"sft": settings.sft.is_on, "rl": settings.train.iterations > 0}
    return tuple(phase for phase, here in is_on.items() if here)


def optimizers(settings: Settings, phases: Sequence[str]) -> dict[str, OptimizerSettings]:
    """Return the optimizers of phases, by section name."""
    every = {
        "sft": ("sft.optimizer", settings.sft.optimizer),
        "rl": ("optimizer", settings.optimizer),
    }
    return dict(every[phase] for phase in phases)


def _passed_misfit(sections: Mapping[str, Any]) -> str:
    for key, section in sections.items():
        for name, value in section.megatron.items():
            own = RENAMED.get(name, name)
            if any(field.name == own for field in fields(section)):
                said = f"{key}.megatron.{name}={text(value)}"
                return f"{said} would replace {key}.{own} unseen; write {key}.{own}"
    return ""


def _rates_misfit(every: Mapping[str, OptimizerSettings]) -> str:
    for key, optimizer in every.items():
        peak, least = optimizer.learning_rate, optimizer.min_learning_rate
        if least > peak:
            return (
                f"{key}.min_learning_rate={least:g} is above {key}.learning_rate={peak:g}, the "
                f"peak that it decays from; lower the first to {peak:g}, or raise the other"
            )
    return ""


def _fp8_misfit(precision: str, fp8: Fp8Settings, *, has_rl: bool) -> str:
    for key, default in asdict(Fp8Settings()).items():
        value = getattr(fp8, key)
        if precision != "fp8" and value != default:
            return (
                f"fp8.{key}={text(value)} is for precision=fp8, and precision={precision}; "
                "set precision=fp8 or leave it out"
            )
    if fp8.recipe != "delayed":
        return ""
    if has_rl:
        return (
            "fp8.recipe=delayed scales by the values of earlier forwards, so a token's "
            "log-probability would depend on which rollouts came before it; use blockwise or "
            "tensorwise, or train.iterations=0 for a supervised phase only"
        )
    for key in ("bf16_first_layers", "bf16_last_layers"):
        if getattr(fp8, key):
            return (
                f"fp8.{key}={getattr(fp8, key)}: the recipe delayed has all layers in FP8 or "
                f"none; use fp8.{key}=0 or fp8.recipe=tensorwise"
            )
    return ""


def _spec_misfit(precision: str, kernels: KernelSettings) -> str:
    spec = kernels.layer_spec
    if spec == "te" and precision == "fp32":
        return (
            "kernels.layer_spec=te has no attention in float32, and precision=fp32; use "
            "precision=bf16 or kernels.layer_spec=auto"
        )
    wants = {
        "precision=fp8": precision == "fp8",
        "kernels.batch_invariant=true": kernels.batch_invariant,
        "kernels.cuda_graphs=true": kernels.cuda_graphs,
    }
    first = next((key for key, is_set in wants.items() if is_set), None)
    needs = f"{first} needs Transformer Engine's layers"
    if first and spec == "local":
        return f"{needs}, and kernels.layer_spec=local; use kernels.layer_spec=auto"
    if first and precision == "fp32":
        return f"{needs}, which precision=fp32 does not use; set precision=bf16"
    return ""


def _batch_invariant_misfit(precision: str, layouts: Layouts) -> str:
    if precision == "fp8":
        return (
            "kernels.batch_invariant=true has only bfloat16 products, and precision=fp8; use "
            "precision=bf16"
        )
    for key, parallel in layouts:
        if parallel.context > 1:
            return (
                f"kernels.batch_invariant=true needs whole rows on each rank, and {key} has "
                f"context={parallel.context}; use context=1"
            )
    return ""


def _graphs_misfit(layouts: Layouts) -> str:
    parallel = layouts[-1][1]
    for name in ("pipeline", "context"):
        if getattr(parallel, name) > 1:
            return (
                "kernels.cuda_graphs=true replays forwards of a whole model, and the rollouts have "
                f"{name}={getattr(parallel, name)}; use {name}=1 (rollout.parallel may set it)"
            )
    if parallel.sequence:
        return (
            "kernels.cuda_graphs=true cannot capture the random-number state of sequence "
            "parallelism, and the rollouts have sequence=true; use sequence=false "
            "(rollout.parallel may set it)"
        )
    return ""


def _optimizer_misfit(precision: str, used: Mapping[str, OptimizerSettings]) -> str:
    for key, optimizer in used.items():
        for name, plain in (("moments", "fp32"), ("main_gradients", "fp32"), ("offload", "0")):
            value = text(getattr(optimizer, name))
            if value != plain and not optimizer.distributed:
                return (
                    f"{key}.{name}={value} is for the distributed optimizer; set "
                    f"{key}.distributed=true"
                )
            if value != plain and precision == "fp32":
                return (
                    f"{key}.{name}={value} is for bf16 weights, and precision=fp32; "
                    f"use precision=bf16 or {key}.{name}={plain}"
                )
        if optimizer.moments != "fp32" and optimizer.adam_beta2 > BF16_BETA2:
            return (
                f"{key}.adam_beta2={optimizer.adam_beta2:g} changes the second moment by less than "
                f"bf16 resolves, and {key}.moments={optimizer.moments}; use at most "
                f"{BF16_BETA2:g}, or {key}.moments=fp32"
            )
        if optimizer.offload and optimizer.moments != "fp32":
            return (
                f"{key}.moments={optimizer.moments}: the CPU updates only fp32 moments, and "
                f"{key}.offload={optimizer.offload:g}; use {key}.moments=fp32 or {key}.offload=0"
            )
    return ""


def _primary_weights_misfit(rollout: RolloutSettings, used: Mapping[str, OptimizerSettings]) -> str:
    said = "fp8.primary_weights=true"
    for key, optimizer in used.items():
        if not optimizer.distributed:
            return (
                f"{said} needs the distributed optimizer, the only one that casts its main "
                f"weights to FP8; set {key}.distributed=true"
            )
        if optimizer.offload:
            return (
                f"{said} needs main weights on the GPU, and {key}.offload={optimizer.offload:g}; "
                f"use {key}.offload=0 or fp8.primary_weights=false"
            )
    if rollout.parallel is not None:
        return (
            f"{said}: FP8 weights cannot change their layout, and rollout.parallel="
            f"{rollout.parallel}; use rollout.parallel=null or fp8.primary_weights=false"
        )
    return ""


def _bf16_layers_misfit(fp8: Fp8Settings, model: ModelSettings, layouts: Layouts) -> str:
    layers = model.num_layers
    if not model.is_known:
        return ""
    if fp8.bf16_first_layers + fp8.bf16_last_layers >= layers:
        return (
            f"fp8.bf16_first_layers={fp8.bf16_first_layers} and fp8.bf16_last_layers="
            f"{fp8.bf16_last_layers} leave none of model.num_layers={layers} in FP8; use fewer, or "
            "precision=bf16"
        )
    for key, parallel in layouts:
        most = layers // parallel.pipeline
        for name in ("bf16_first_layers", "bf16_last_layers"):
            if getattr(fp8, name) > most:
                return (
                    f"fp8.{name}={getattr(fp8, name)} is more than a stage holds: "
                    f"model.num_layers={layers} / {key} pipeline={parallel.pipeline}; use at most "
                    f"{most}"
                )
    return ""


def _layouts(settings: Settings) -> Layouts:
    """Return the layouts of training and, last, of rollouts, each with its setting's key."""
    layouts = [("parallel", settings.parallel)]
    if settings.rollout.parallel is not None:
        layouts.append(("rollout.parallel", settings.rollout_layout))
    return layouts


def _widths(model: ModelSettings, parallel: ParallelSettings, key: str) -> dict[str, int]:
    """Return the inputs and outputs of a layer's matrix products on one rank, with their names."""
    size, queries = parallel.tensor, model.query_width
    products = queries + 2 * model.key_width
    share = f" / {key} tensor={size}" if size > 1 else ""
    return {
        f"model.hidden_size={model.hidden_size}": model.hidden_size,
        f"the attention's output of {queries}{share}": queries // size,
        f"query, key and value of {products}{share}": products // size,
        f"model.ffn_hidden_size={model.ffn_hidden_size}{share}": model.ffn_hidden_size // size,
    }
