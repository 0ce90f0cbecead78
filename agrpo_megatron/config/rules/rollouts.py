"""Rules of the rollouts that a run keeps, replays, or samples ahead, and of their memory."""

import os

from agrpo_megatron.config.rules.algorithm import OF_ESTIMATORS
from agrpo_megatron.config.settings import Settings

CORRECTION = "rollout_correction"


def validate_rollouts(settings: Settings) -> None:
    """Check what a run does with its rollouts.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    validate_stored_rollouts(settings)
    validate_ahead(settings)
    validate_release(settings)


def validate_stored_rollouts(settings: Settings) -> None:
    """Check what a run keeps of its rollouts, and that it does not replay its own.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    checkpoint, source, own = settings.checkpoint, settings.train.from_rollouts, settings.run.dir
    if checkpoint.keep_rollouts and not checkpoint.rollouts:
        raise ValueError(
            "checkpoint.keep_rollouts=true needs checkpoint.rollouts=true, which stores them; set "
            "it, or use checkpoint.keep_rollouts=false"
        )
    if source is None:
        return
    if os.path.realpath(source) == os.path.realpath(own):
        raise ValueError(
            f"train.from_rollouts={source} is the run's own run.dir={own}; choose another run.dir"
        )
    if checkpoint.keep_rollouts:
        raise ValueError(
            f"checkpoint.keep_rollouts=true keeps nothing, as train.from_rollouts={source} samples "
            "nothing; use checkpoint.keep_rollouts=false"
        )


def validate_ahead(settings: Settings) -> None:
    """Check that rollouts that are sampled ahead of an update can be corrected and stored.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    if not settings.train.async_steps:
        return
    said, algorithm = f"train.async_steps={settings.train.async_steps}", settings.algorithm
    off = "or use train.async_steps=0"
    able = OF_ESTIMATORS[CORRECTION]
    if algorithm.name not in able:
        raise ValueError(
            f"{said} trains on rollouts of older weights, and algorithm.name={algorithm.name} does "
            f"not compare log-probs with the sampler's; use {', '.join(able)}, {off}"
        )
    if algorithm.rollout_correction is None:
        raise ValueError(
            f"{said} trains on rollouts of older weights, and algorithm.{CORRECTION}=null leaves "
            f"out their importance weights; use for example algorithm.{CORRECTION}=2, {off}"
        )
    if algorithm.resample_rounds:
        raise ValueError(
            f"{said} samples before the rewards are known, and algorithm.resample_rounds="
            f"{algorithm.resample_rounds} chooses by rewards what is sampled next; use "
            f"algorithm.resample_rounds=0, {off}"
        )
    if algorithm.rollout_experts is not None:
        raise ValueError(
            f"{said} stores rollouts for restarts, and algorithm.rollout_experts="
            f"{algorithm.rollout_experts} needs records that are not stored; use null, {off}"
        )
    if not settings.checkpoint.rollouts:
        raise ValueError(
            f"{said} needs checkpoint.rollouts=true: after a restart, newer weights would sample "
            f"the next rollouts; set it, {off}"
        )
    if settings.train.from_rollouts is not None:
        raise ValueError(
            f"{said} has no meaning with train.from_rollouts={settings.train.from_rollouts}, which "
            "samples nothing; use train.async_steps=0"
        )


def validate_release(settings: Settings) -> None:
    """Check that the memory which rollouts release can be emptied in place.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    mode, optimizer = settings.rollout.release, settings.optimizer
    if mode == "none":
        return
    said = f"rollout.release={mode}"
    if settings.fp8.primary_weights and settings.fp8.recipe == "mxfp8":
        raise ValueError(
            f"{said} frees gradients, and under fp8.recipe=mxfp8 with fp8.primary_weights=true "
            "their buffers also gather weights; use rollout.release=none"
        )
    if settings.ddp.get("nccl_ub"):
        raise ValueError(
            f"{said} frees gradients, and ddp.nccl_ub=true registers their buffers with NCCL; "
            "use ddp.nccl_ub=false, or rollout.release=none"
        )
    if mode == "gradients":
        return
    if optimizer.offload > 0:
        raise ValueError(
            f"{said} moves the optimizer's states to the host, and optimizer.offload="
            f"{optimizer.offload:g} keeps some of them there; use rollout.release=gradients, or "
            "optimizer.offload=0"
        )
    if optimizer.moments == "fp8":
        raise ValueError(
            f"{said} cannot move the scaled moments of optimizer.moments=fp8; use "
            "rollout.release=gradients, or optimizer.moments=bf16"
        )
