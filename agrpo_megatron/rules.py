"""Rules that tie settings together, checked before a process group or a GPU is touched."""

from pathlib import Path

from agrpo_megatron.settings import (
    ModelSettings,
    ParallelSettings,
    SamplingSettings,
    Settings,
    evaluation_sampling,
)


def validate(settings: Settings, world_size: int = 1) -> None:
    """Check the rules that tie settings together, before a process group or GPU is touched.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    _validate_model(settings.model, settings.parallel, world_size)
    validate_sampling(settings.sampling, "sampling")
    validate_sampling(evaluation_sampling(settings), "evaluation")
    path = settings.tokenizer.path
    if path is not None and not Path(path).exists():
        raise ValueError(
            f"tokenizer.path={path} does not exist; give a sentencepiece .model file, a Hugging "
            "Face directory, or null for the built-in characters"
        )
    load = settings.model.load
    if load is not None and not Path(load).is_dir():
        raise ValueError(f"model.load={load} is not a directory; give a Hugging Face or run folder")
    if settings.sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature=0 draws equal completions in a group, so no advantage; "
            "use a positive temperature such as 1.0 (evaluation.temperature may be 0)"
        )
    longest = settings.sampling.completion_length
    if longest >= settings.model.max_sequence_length:
        raise ValueError(
            f"sampling.completion_length={longest} leaves no room for a prompt in "
            f"model.max_sequence_length={settings.model.max_sequence_length}; shorten or raise it"
        )


def validate_sampling(sampling: SamplingSettings, section_name: str) -> None:
    """Check that blocks and denoising steps divide as the sampler needs."""
    length, block = sampling.completion_length, sampling.block_length
    if length % block:
        fits = [b for b in range(1, length + 1) if length % b == 0]
        near = sorted(fits, key=lambda b: abs(b - block))[:2]
        raise ValueError(
            f"{section_name}.block_length={block} does not divide "
            f"sampling.completion_length={length}; use {' or '.join(map(str, sorted(near)))}"
        )
    blocks, steps = length // block, sampling.denoising_steps
    if steps % blocks or steps > length:
        down = max(blocks, min(length, steps - steps % blocks))
        raise ValueError(
            f"{section_name}.denoising_steps={steps} must be a multiple of the {blocks} blocks "
            f"and at most sampling.completion_length={length}; use {down}"
        )


def _validate_model(model: ModelSettings, parallel: ParallelSettings, world_size: int) -> None:
    heads, tensor = model.num_attention_heads, parallel.tensor
    if model.hidden_size % heads:
        raise ValueError(
            f"model.num_attention_heads={heads} does not divide "
            f"model.hidden_size={model.hidden_size}; use {_divisor_near(model.hidden_size, heads)}"
        )
    groups = model.num_query_groups or heads
    if heads % groups:
        raise ValueError(
            f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}; "
            f"use {_divisor_near(heads, groups)}"
        )
    for key, value in (("num_query_groups", groups), ("ffn_hidden_size", model.ffn_hidden_size)):
        if value % tensor:
            raise ValueError(
                f"parallel.tensor={tensor} does not divide model.{key}={value}; "
                f"use {_divisor_near(value, tensor)}"
            )
    if world_size % tensor:
        raise ValueError(
            f"parallel.tensor={tensor} does not divide the {world_size} ranks that were started; "
            f"start {tensor} ranks (torchrun --nproc-per-node {tensor}) or use "
            f"{_divisor_near(world_size, tensor)}"
        )
    if parallel.sequence and tensor == 1:
        raise ValueError(
            "parallel.sequence=true needs parallel.tensor of at least 2; set it to false"
        )


def _divisor_near(whole: int, wanted: int) -> int:
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
