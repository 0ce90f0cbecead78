"""Rules of a run whose model attends by blocks and decodes one after another."""

from agrpo_megatron.config.rules.cached import validate_cached
from agrpo_megatron.config.settings import (
    ModelSettings,
    RolloutSettings,
    SamplingSettings,
    Settings,
)
from agrpo_megatron.config.settings.estimators import ENTRIES

# Estimators that score tokens of later blocks from a state in which earlier ones are masked.
ACROSS = ("step_merge", "tracerl", "rldf")


def validate_blocks(settings: Settings) -> None:
    """Check that layouts, kernels and samplers fit a block model.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    validate_cached(settings)
    by = f"model.attention={settings.model.attention}"
    layouts = (("parallel.", settings.parallel), ("rollout.parallel: ", settings.rollout_layout))
    for key, parallel in layouts:
        if parallel.context > 1:
            raise ValueError(
                f"{key}context={parallel.context} shares a row among ranks, and {by} needs whole "
                "rows on each; use context=1"
            )
    if settings.kernels.cuda_graphs:
        raise ValueError(
            f"kernels.cuda_graphs=true replays forwards of whole rows, and {by} decodes block "
            "after block; use kernels.cuda_graphs=false"
        )
    if settings.kernels.batch_invariant:
        raise ValueError(
            f"kernels.batch_invariant=true has no attention for {by}; use "
            "kernels.batch_invariant=false"
        )
    validate_block_estimator(settings.algorithm.name, settings.model)
    validate_block_model(settings.model)
    if settings.sft.autoregressive_weight and settings.model.attention != "causal_context":
        raise ValueError(_not_causal(settings))
    validate_block_sampling(settings.sampling, settings.model, "sampling")
    validate_block_sampling(settings.evaluation_sampling, settings.model, "evaluation")


def validate_whole_rows(settings: Settings) -> None:
    """Check that a model without blocks has no settings of block models.

    Raises:
        ValueError: the first rule broken, or attention is causal; with key, value, rule and fix.
    """
    if settings.model.attention == "causal":
        raise ValueError(
            "model.attention=causal predicts one token after another, and a run decodes masked "
            "tokens; use full, or block_causal with model.block_length"
        )
    validate_cached(settings)
    if settings.rollout.cached:
        raise ValueError(
            "rollout.cached=true needs finished blocks that no longer change, and in a model with "
            "model.attention=full every token sees the later ones; use null or false"
        )
    has_cache = settings.sampling.is_cached
    if settings.rollout.cache_memory != RolloutSettings.cache_memory and not has_cache:
        raise ValueError(
            f"rollout.cache_memory={settings.rollout.cache_memory:g} is for models with blocks or "
            "a cached policy, and model.attention is full; use "
            f"{RolloutSettings.cache_memory:g}, or sampling.policy=cached"
        )
    validate_block_sampling(settings.sampling, settings.model, "sampling")
    validate_block_estimator(settings.algorithm.name, settings.model)
    if settings.sft.autoregressive_weight:
        raise ValueError(_not_causal(settings))
    chosen = settings.kernels.block_attention
    if chosen != "auto" and not settings.has_patterns:
        raise ValueError(
            f"kernels.block_attention={chosen} is for models with blocks, a cached policy or a "
            "schedule of attention, and there is none; use auto"
        )


def _not_causal(settings: Settings) -> str:
    return (
        f"sft.autoregressive_weight={settings.sft.autoregressive_weight:g} predicts next tokens "
        "from what is before them, and with model.attention="
        f"{settings.model.attention} they are visible; use 0"
    )


def validate_block_model(model: ModelSettings) -> None:
    """Check that a block model predicts each token in its own place.

    Raises:
        ValueError: it predicts a token from the one before.
    """
    if model.has_blocks and model.shift:
        raise ValueError(
            f"model.shift=true predicts a token from the one before, and model.attention="
            f"{model.attention} predicts a block's first token from its own place; use "
            "model.shift=false"
        )


def validate_block_estimator(name: str, model: ModelSettings) -> None:
    """Check that an estimator scores states that a model with or without blocks has.

    Raises:
        ValueError: it does not; names those that do.
    """
    by = f"model.attention={model.attention}"
    if model.has_blocks and name in ACROSS:
        fitting = ", ".join(entry for entry in ENTRIES if entry not in ACROSS)
        raise ValueError(
            f"algorithm.name={name} scores tokens from a state in which earlier blocks are masked, "
            f"and {by} never has one; use {fitting}"
        )
    if not model.has_blocks and name == "block_just_grpo":
        raise ValueError(
            f"algorithm.name=block_just_grpo scores all blocks from one row, and with {by} a block "
            "sees the others masked; use just_grpo"
        )


def validate_block_sampling(sampling: SamplingSettings, model: ModelSettings, section: str) -> None:
    """Check that a sampler decodes the blocks by which a model attends.

    Args:
        section: of the settings, for messages.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    by, length = f"model.attention={model.attention}", model.block_length
    if not model.has_blocks:
        if sampling.edit_threshold is not None:
            raise ValueError(
                f"sampling.edit_threshold={sampling.edit_threshold:g} is for the decoding of "
                "models with blocks, and model.attention is full; use null"
            )
        return
    if sampling.schedule == "dream":
        raise ValueError(
            f"sampling.schedule=dream decodes the completion as one block, and {by} decodes "
            "block after block; use uniform"
        )
    if sampling.unmasking == "bernoulli":
        raise ValueError(
            f"{section}.unmasking=bernoulli takes its rates from Dream's time, and {by} has "
            "steps of each block; use random"
        )
    if sampling.block_length != length:
        raise ValueError(
            f"{section}.block_length={sampling.block_length} differs from model.block_length="
            f"{length}, and {by} decodes the blocks that it attends by; use {length}"
        )
