"""What a request asks of a model: its sampler, its noise, and the room for its prompt."""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings, Settings
from agrpo_megatron.evaluation.evaluate import EVALUATION_IDS, SAMPLE_IDS
from agrpo_megatron.megatron.parallel import world_size

NOISE = 1 << 62  # noise indices there are
# Settings of `evaluation` that a request may change.
CHANGES = ("temperature", "top_p", "top_k", "unmasking", "denoising_steps", "block_length")


def request_sampling(
    settings: Settings, *, most: int | None = None, **changes: Any
) -> SamplingSettings:
    """Return the sampler of a request: that of `evaluation` with changes, and another length.

    A length is rounded up to whole blocks. Unless they are among the changes, the denoising steps
    are as many per token as `evaluation` takes.

    Args:
        most: tokens that are asked for; None: `sampling.completion_length`.
        changes: of `CHANGES`; None is no change.

    Raises:
        ValueError: the sampler cannot take a value.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    base = settings.evaluation_sampling
    asked = base.completion_length if most is None else most
    block = given.get("block_length", base.block_length)
    if asked < 1 or block < 1:
        raise ValueError(f"{asked} tokens in blocks of {block}: both must be at least 1")
    if base.schedule == "dream":
        block = asked
    length = -(-asked // block) * block
    each = round(block * base.denoising_steps / base.completion_length)
    steps = length // block * max(1, min(block, each))
    steps = given.get("denoising_steps", steps)
    evaluation = replace(
        settings.evaluation, **{**given, "block_length": block, "denoising_steps": steps}
    )
    sampling = replace(settings.sampling, completion_length=length, block_length=block)
    changed = replace(
        settings,
        evaluation=evaluation,
        sampling=replace(sampling, denoising_steps=steps),
        algorithm=AlgorithmSettings(),
    )
    validate(changed, world_size())
    return changed.evaluation_sampling


def check_room(settings: Settings, prompt: Sequence[int], sampling: SamplingSettings) -> None:
    """Check that a prompt and its completion fit into a row.

    Raises:
        ValueError: they do not, or the prompt is empty.
    """
    limit, length = settings.model.max_sequence_length, sampling.completion_length
    if not prompt:
        raise ValueError("the prompt is empty; give it text")
    if len(prompt) + length > limit:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, and model.max_sequence_length={limit} leaves "
            f"{limit - length} in addition to the completion's {length}; shorten one of them"
        )


def noise_index(seed: int | None, number: int) -> int:
    """Return the noise index of a completion; seed 0 is that of `agrpo sample --prompt`.

    Args:
        seed: None draws one.
        number: among the completions of one prompt.
    """
    place = secrets.randbelow(NOISE) if seed is None else seed
    return (EVALUATION_IDS + place + number * SAMPLE_IDS) % NOISE
