"""Rules of low-rank adapters."""

import os
from dataclasses import fields

from agrpo_megatron.config.settings import LoraSettings, Settings
from agrpo_megatron.config.values import text


def validate_lora(settings: Settings) -> None:
    """Check that adapters fit the rest of the run, and that nothing is set without them.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    lora = settings.lora
    if lora.rank is None:
        for field in fields(LoraSettings):
            value, default = getattr(lora, field.name), getattr(LoraSettings(), field.name)
            if value != default:
                raise ValueError(
                    f"lora.{field.name}={text(value)} is for adapters, and lora.rank is null; set "
                    f"lora.rank, for example to 64, or use lora.{field.name}={text(default)}"
                )
        return
    if lora.modules == []:
        raise ValueError(
            "lora.modules=[] names no layer; use null for all linear layers of the blocks"
        )
    for name in ("train_embedding", "train_head"):
        if settings.model.tie_embeddings and getattr(lora, name):
            raise ValueError(
                f"lora.{name}=true trains one of embedding and head, and model.tie_embeddings=true "
                f"gives them the same weights; use lora.{name}=false"
            )
    if lora.load is not None and not os.path.isdir(lora.load):
        fix = "give one in PEFT's format, or fetch it by `agrpo prefetch FILE`"
        raise ValueError(f"lora.load={lora.load} is not a directory; {fix}")
    if lora.merge_rollouts and settings.fp8.primary_weights:
        raise ValueError(
            "lora.merge_rollouts=true adds to the weights, and fp8.primary_weights=true keeps them "
            "in 8 bits only; use lora.merge_rollouts=false"
        )
    if settings.model.moe.experts is not None and settings.rollout_layout != settings.parallel:
        _check_moves(settings)
    if settings.algorithm.needs_reference:
        _check_reference(settings)


def _check_moves(settings: Settings) -> None:
    """Check that Megatron can move the adapters of experts into the layout of rollouts.

    Of an expert that ranks split, it takes every matrix as split, and each adapter has a whole one.
    """
    layouts = {"parallel": settings.parallel, "rollout.parallel": settings.rollout_layout}
    for key, parallel in layouts.items():
        if parallel.expert_tensor > 1:
            raise ValueError(
                f"{key}.expert_tensor={parallel.expert_tensor} splits adapters of experts, which "
                "cannot be moved between parallel and a separate rollout.parallel; use "
                f"{key}.expert_tensor=1, or rollout.parallel=null"
            )


def _check_reference(settings: Settings) -> None:
    """Check that the model without its adapters is the policy that the run starts from."""
    lora = settings.lora
    others = {
        "sft.iterations": settings.sft.iterations,
        "sft.epochs": settings.sft.epochs,
        "lora.load": lora.load,
        "lora.train_embedding": lora.train_embedding,
        "lora.train_head": lora.train_head,
    }
    for key, value in others.items():
        if value:
            fix = {"sft.iterations": "0", "sft.epochs": "null", "lora.load": "null"}.get(
                key, "false"
            )
            raise ValueError(
                f"{key}={text(value)} changes the policy before or beyond its adapters, and the "
                "reference of the KL term is the model without them; merge an earlier run by "
                f"model.load=RUN, and use {key}={fix}"
            )
