"""Rules that tie settings together, checked before a process group or a GPU is touched."""

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from agrpo_megatron.config.parallel import layout_name, layout_text, model_ranks, stage_layers
from agrpo_megatron.config.rules.algorithm import validate_algorithm
from agrpo_megatron.config.rules.blocks import validate_blocks, validate_whole_rows
from agrpo_megatron.config.rules.lora import validate_lora
from agrpo_megatron.config.rules.model import divisors, two_nearest, validate_model
from agrpo_megatron.config.rules.moe import expert_misfit, expert_rank_misfit, validate_experts
from agrpo_megatron.config.rules.precision import validate_precision
from agrpo_megatron.config.rules.rollouts import validate_rollouts
from agrpo_megatron.config.rules.supervised import validate_supervised
from agrpo_megatron.config.settings import (
    ModelSettings,
    ParallelSettings,
    SamplingSettings,
    Settings,
    TaskSettings,
)
from agrpo_megatron.config.settings.resilience import SECTIONS
from agrpo_megatron.config.values import MOST_SECONDS, text


def validate(settings: Settings, world_size: int = 1) -> None:
    """Check the rules that tie settings together, before a process group or GPU is touched.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    if settings.model.is_known:
        validate_model(settings.model)
        validate_kind = validate_blocks if settings.model.has_blocks else validate_whole_rows
        validate_kind(settings)
        validate_layout(settings.model, settings.parallel, world_size=world_size)
        if settings.rollout.parallel is not None:
            _validate_rollout(settings, world_size)
    validate_experts(settings)
    validate_precision(settings)
    validate_lora(settings)
    validate_supervised(settings)
    validate_sampling(settings.sampling, "sampling")
    validate_sampling(settings.evaluation_sampling, "evaluation")
    validate_algorithm(settings.algorithm, settings.sampling)
    path = settings.tokenizer.path
    if path is not None and not os.path.exists(path):
        raise ValueError(
            f"tokenizer.path={path} does not exist; give a sentencepiece .model file, a Hugging "
            "Face directory, or null for the built-in characters"
        )
    load = settings.model.load
    if load is not None and not os.path.isdir(load):
        fix = "give a Hugging Face or run folder, or fetch one by `agrpo prefetch FILE`"
        raise ValueError(f"model.load={load} is not a directory; {fix}")
    _validate_metric("checkpoint.best", settings.checkpoint.best, settings.task)
    _validate_stop(settings)
    validate_rollouts(settings)
    _validate_timeouts(settings.resilience.timeouts)
    rates = settings.task
    if rates.pass_rate_low > rates.pass_rate_high:
        raise ValueError(
            f"task.pass_rate_low={rates.pass_rate_low:g} is above task.pass_rate_high="
            f"{rates.pass_rate_high:g}, which leaves no problem; lower it"
        )
    if settings.sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature=0 draws equal completions in a group, so no advantage; "
            "use a positive temperature such as 1.0 (evaluation.temperature may be 0)"
        )
    longest = settings.sampling.completion_length
    if settings.model.is_known and longest >= settings.model.max_sequence_length:
        raise ValueError(
            f"sampling.completion_length={longest} leaves no room for a prompt in "
            f"model.max_sequence_length={settings.model.max_sequence_length}; shorten or raise it"
        )


def _validate_metric(key: str, name: str | None, task: TaskSettings) -> None:
    """Check that evaluations have a metric; only evaluations know the parts of a reward."""
    labels = [f"accuracy/{label}" for label in task.mixture] if task.name == "mixture" else []
    known = ["accuracy", *labels]
    if name is None or name in known or name.startswith(("reward/", "summary/")):
        return
    raise ValueError(
        f"{key}={name} is not an evaluation metric; use {', '.join(known)}, reward/mean, the "
        "name of a part of the reward such as reward/format, or null"
    )


def _validate_stop(settings: Settings) -> None:
    train = settings.train
    _validate_metric("train.stop_metric", train.stop_metric, settings.task)
    for key in ("stop_target", "stop_patience"):
        if train.stop_metric is None and getattr(train, key) is not None:
            raise ValueError(
                f"train.{key}={getattr(train, key):g} needs train.stop_metric; use for example "
                "train.stop_metric=accuracy"
            )
    if train.stop_metric is None:
        return
    if train.stop_target is None and train.stop_patience is None:
        raise ValueError(
            f"train.stop_metric={train.stop_metric} needs train.stop_target or "
            "train.stop_patience; use for example train.stop_patience=5"
        )
    if settings.evaluation.interval == 0:
        raise ValueError(
            f"train.stop_metric={train.stop_metric} needs evaluations during training, "
            "and evaluation.interval=0 makes none; use for example evaluation.interval=25"
        )


def _validate_timeouts(timeouts: Mapping[str, Any]) -> None:
    for section, limit in timeouts.items():
        said = f"resilience.timeouts.{section}={text(limit)}"
        if section not in SECTIONS:
            raise ValueError(f"{said} names no section; use {', '.join(SECTIONS)}")
        if type(limit) not in (int, float) or not 0 < limit <= MOST_SECONDS:
            raise ValueError(f"{said} is not a time limit; use 1 to {MOST_SECONDS} seconds")


def validate_sampling(sampling: SamplingSettings, section_name: str) -> None:
    """Check that blocks and denoising steps divide as the sampler needs."""
    length, block = sampling.completion_length, sampling.block_length
    if length % block:
        raise ValueError(
            f"{section_name}.block_length={block} does not divide "
            f"sampling.completion_length={length}; use {two_nearest(block, divisors(length))}"
        )
    blocks, steps = length // block, sampling.denoising_steps
    if sampling.schedule == "dream" and sampling.block_origin == "row":
        raise ValueError(
            "sampling.schedule=dream decodes the completion as one block, and "
            "sampling.block_origin=row splits it; use completion"
        )
    if sampling.schedule == "dream" and blocks > 1:
        raise ValueError(
            f"sampling.schedule=dream decodes the completion as one block, and {section_name}."
            f"block_length={block}; use {length}"
        )
    if sampling.unmasking == "bernoulli" and sampling.schedule != "dream":
        raise ValueError(
            f"{section_name}.unmasking=bernoulli takes its rates from Dream's time; set "
            "sampling.schedule=dream, or use random"
        )
    for key in ("threshold", "edit_threshold"):
        chance = getattr(sampling, key)
        if chance is not None and sampling.unmasking in ("margin", "bernoulli"):
            raise ValueError(
                f"sampling.{key}={chance} is a probability of tokens, and {section_name}."
                f"unmasking={sampling.unmasking} does not rank by it; use low_confidence, or null"
            )
    if sampling.schedule != "dream" and (steps % blocks or steps > length):
        down = max(blocks, min(length, steps - steps % blocks))
        raise ValueError(
            f"{section_name}.denoising_steps={steps} must be a multiple of the {blocks} blocks "
            f"and at most sampling.completion_length={length}; use {down}"
        )


def validate_layout(
    model: ModelSettings, parallel: ParallelSettings, *, world_size: int, key: str = "parallel"
) -> None:
    """Check that a layout fits the model and the ranks that were started.

    `key` names the setting: the section `parallel`, or another setting's text.

    Raises:
        ValueError: the first rule broken, with the nearest layout that fits.
    """
    is_section = key == "parallel"
    said = "parallel." if is_section else f"{key}={layout_text(parallel)}: "
    fix = ""
    problem = _model_misfit(model, parallel, at="parallel." if is_section else "")
    if not problem and (problem := _rank_misfit(parallel, world_size)):
        size = model_ranks(parallel)
        ranks = parallel.data * size if parallel.data else -(-world_size // size) * size
        fix = f"start {ranks} ranks (torchrun --nproc-per-node {ranks}) or "
    if not problem and (problem := _layers_misfit(model, parallel)):
        even = stage_layers(model, replace(parallel, layers=None))
        fix = f"use {said}layers={list(even)} or "
    if problem:
        near = layout_name(nearest_layout(model, parallel, world_size=world_size), world_size)
        raise ValueError(f"{said}{problem}; {fix}use {key}={near}, the nearest layout that fits")


def layout_fits(model: ModelSettings, parallel: ParallelSettings, *, world_size: int) -> bool:
    """Return whether `validate_layout` takes a layout without `layers`."""
    return not (_model_misfit(model, parallel) or _rank_misfit(parallel, world_size))


def nearest_layout(
    model: ModelSettings, parallel: ParallelSettings, *, world_size: int
) -> ParallelSettings:
    """Return the valid layout nearest to `parallel`; the split chooses `layers`."""
    fitting = []
    for tensor, pipeline, context in itertools.product(divisors(world_size), repeat=3):
        if world_size % (tensor * pipeline * context):
            continue
        virtual = min(parallel.virtual, model.num_layers // pipeline) if pipeline > 1 else 1
        near = ParallelSettings(
            tensor=tensor,
            sequence=(parallel.sequence or model.moe.experts is not None) and tensor > 1,
            pipeline=pipeline,
            virtual=max(1, virtual),
            context=context,
            data=world_size // (tensor * pipeline * context),
        )
        near = _with_experts(near, model, parallel.expert, world_size)
        if not _model_misfit(model, near):
            fitting.append(near)
    return min(fitting, key=lambda near: _distance(near, parallel))


def _with_experts(
    near: ParallelSettings, model: ModelSettings, asked: int, world_size: int
) -> ParallelSettings:
    """Return the layout with the largest expert parallelism up to the size that was asked for."""
    found = near
    for expert in range(2, asked + 1):
        one = replace(near, expert=expert)
        if not (expert_misfit(model, one) or expert_rank_misfit(one, world_size)):
            found = one
    return found


def _distance(near: ParallelSettings, asked: ParallelSettings) -> tuple[Any, ...]:
    """Return a sort key: the sum of |log2 ratio| over tensor, pipeline, context, virtual.

    The key is a product of fractions, so equal distances compare equal. Ties go to the layout that
    keeps `sequence`, `data` and, in order, the sizes.
    """
    names = ("tensor", "pipeline", "context", "virtual")
    pairs = [(getattr(near, name), getattr(asked, name)) for name in names]
    ratios = [Fraction(max(pair), min(pair)) for pair in pairs]
    lost = near.sequence != asked.sequence, near.data != (asked.data or near.data)
    return math.prod(ratios), *lost, *ratios, pairs


def _model_misfit(model: ModelSettings, parallel: ParallelSettings, *, at: str = "") -> str:
    """Return the broken rule between layout and model, after its key's prefix; empty if none."""
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual
    heads = "num_query_groups" if model.num_query_groups else "num_attention_heads"
    for name in (heads, "ffn_hidden_size"):
        if getattr(model, name) % tensor:
            return f"tensor={tensor} does not divide model.{name}={getattr(model, name)}"
    if parallel.sequence and tensor == 1:
        return f"sequence=true needs {at}tensor of at least 2"
    if virtual > 1 and pipeline == 1:
        return f"virtual={virtual} needs {at}pipeline of at least 2"
    if pipeline * virtual > model.num_layers:
        stages = f"{pipeline} x {at}virtual={virtual} stages" if virtual > 1 else str(pipeline)
        return f"pipeline={stages} is more than model.num_layers={model.num_layers}"
    return expert_misfit(model, parallel, at=at)


def _rank_misfit(parallel: ParallelSettings, world_size: int) -> str:
    left, ranks = world_size, f"the {world_size} ranks that were started"
    for name in ("tensor", "pipeline", "context"):
        size = getattr(parallel, name)
        if left % size:
            return f"{name}={size} does not divide {ranks}"
        left //= size
        if left < world_size:
            ranks = f"the {left} ranks left of the {world_size} that were started"
    if parallel.data not in (None, left):
        return f"data={parallel.data} is not {ranks}"
    return expert_rank_misfit(parallel, world_size)


def _layers_misfit(model: ModelSettings, parallel: ParallelSettings) -> str:
    layers, stages = parallel.layers, parallel.pipeline * parallel.virtual
    if layers is None:
        return ""
    if len(layers) != stages:
        return f"layers={layers} has {len(layers)} entries for {stages} stages"
    if min(layers) < 1:
        return f"layers={layers} leaves a stage without a layer"
    if sum(layers) != model.num_layers:
        return f"layers={layers} adds up to {sum(layers)}, not model.num_layers={model.num_layers}"
    return ""


def _validate_rollout(settings: Settings, world_size: int) -> None:
    model, parallel = settings.model, settings.rollout_layout
    key, text = "rollout.parallel", settings.rollout.parallel
    if parallel.virtual > 1:
        flat = replace(parallel, virtual=1)
        near = nearest_layout(model, flat, world_size=world_size)
        raise ValueError(
            f"{key}={text}: vpp{parallel.virtual} is for training only, as the rollouts' ring "
            f"keeps every stage busy; use {key}={layout_name(near, world_size)}"
        )
    validate_layout(model, parallel, world_size=world_size, key=key)
