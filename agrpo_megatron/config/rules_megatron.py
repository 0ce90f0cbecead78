"""Rules of what Megatron and torch assert later: learning rates, and what is passed by name."""

from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.rules_precision import optimizers
from agrpo_megatron.config.settings import OptimizerSettings, Settings
from agrpo_megatron.config.settings.resilience import SECTIONS
from agrpo_megatron.config.values import MOST_SECONDS, text

# Names of Megatron's that have a setting here: passed by name they would replace it unseen.
_LAYOUT = {
    "tensor_model_parallel_size": "parallel.tensor",
    "sequence_parallel": "parallel.sequence",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual",
    "context_parallel_size": "parallel.context",
}
_MODEL = {
    name: f"model.{name}"
    for name in ("num_layers", "hidden_size", "ffn_hidden_size")
    + ("num_attention_heads", "num_query_groups")
} | {
    "layernorm_epsilon": "model.norm_epsilon",
    "add_qkv_bias": "model.qkv_bias",
    "qk_layernorm": "model.qk_norm",
    "init_method_std": "model.init_std",
}
_PRECISION = dict.fromkeys(("bf16", "fp16", "fp8", "params_dtype", "pipeline_dtype"), "precision")
_OPTIMIZER = {name: name for name in ("weight_decay", "adam_beta1", "adam_beta2", "clip_grad")} | {
    "lr": "learning_rate",
    "min_lr": "min_learning_rate",
    "use_distributed_optimizer": "distributed",
}
_DDP = {"use_distributed_optimizer": "optimizer.distributed"}


def validate_for_megatron(settings: Settings) -> None:
    """Check the rules.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    _check_names("model.megatron", settings.model.megatron, {**_LAYOUT, **_MODEL, **_PRECISION})
    _check_names("ddp", settings.ddp, _DDP)
    for key, optimizer in optimizers(settings, ("sft", "rl")).items():
        _check_rates(key, optimizer)
        own = {name: f"{key}.{setting}" for name, setting in _OPTIMIZER.items()}
        _check_names(f"{key}.megatron", optimizer.megatron, {**own, **_PRECISION})
    for section, limit in settings.resilience.timeouts.items():
        said = f"resilience.timeouts.{section}={text(limit)}"
        if section not in SECTIONS:
            raise ValueError(f"{said} names no section; use {', '.join(SECTIONS)}")
        is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if not is_number or not 0 < limit <= MOST_SECONDS:
            raise ValueError(
                f"{said} is not a time limit; use a number of seconds up to {MOST_SECONDS}"
            )


def _check_rates(key: str, optimizer: OptimizerSettings) -> None:
    peak, least = optimizer.learning_rate, optimizer.min_learning_rate
    if least > peak:
        raise ValueError(
            f"{key}.min_learning_rate={least:g} is above {key}.learning_rate={peak:g}, from which "
            f"the rate decays to it; use {key}.min_learning_rate={peak:g} or less, or a higher "
            f"{key}.learning_rate"
        )


def _check_names(key: str, passed: Mapping[str, Any], own: Mapping[str, str]) -> None:
    for name, value in passed.items():
        if name in own:
            raise ValueError(
                f"{key}.{name}={text(value)} would replace {own[name]} unseen; write {own[name]}"
            )
