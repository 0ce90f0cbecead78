"""Attention of the supervised phase by schedule: what each of its iterations lets a token see.

A model that starts from autoregressive weights has seen only what is before a token. It gets used
to the rest step by step, in one of two ways:

    sft.anneal_iterations  each token sees a growing share of the tokens after it, up to all
    sft.block_schedule     tokens see the blocks up to their own, of lengths by stages
"""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from agrpo_megatron.config.schema import written
from agrpo_megatron.config.settings import ModelSettings, SamplingSettings, Settings

WHOLE = "full"
_STAGE = re.compile(rf"(\d+|{WHOLE}) ?x ?(\d+)")


class Stage(NamedTuple):
    """Iterations with one block length."""

    block: int | None  # None: a token sees its whole row
    iterations: int


@dataclass(frozen=True)
class Attention:
    """What tokens see in an iteration, as settings of a model and of its blocks."""

    model: ModelSettings
    sampling: SamplingSettings
    ahead: float | None = None  # share of the tokens after its own that a token sees; None: all


def stages(settings: Settings) -> list[Stage]:
    """Return the stages of `sft.block_schedule`.

    Raises:
        ValueError: an entry is no stage.
    """
    found = []
    for entry in settings.sft.block_schedule or ():
        parts = _STAGE.fullmatch(entry)
        block = None if parts is None or parts[1] == WHOLE else int(parts[1])
        if parts is None or block == 0 or int(parts[2]) == 0:
            raise ValueError(
                f"sft.block_schedule: {entry} is no stage; write a block length or {WHOLE}, x, and "
                f"iterations, such as 4x100 or {WHOLE}x500"
            )
        found.append(Stage(block, int(parts[2])))
    return found


def scheduled_iterations(settings: Settings) -> int:
    """Return the iterations that a schedule takes, after which the model's own attention holds."""
    return settings.sft.anneal_iterations + sum(stage.iterations for stage in stages(settings))


def attention_at(settings: Settings, iteration: int) -> Attention:
    """Return the attention of an iteration of the supervised phase, counted from 1."""
    model, sampling, sft = settings.model, settings.sampling, settings.sft
    if iteration <= sft.anneal_iterations:
        share = (iteration - 1) / sft.anneal_iterations
        return Attention(model, sampling, ahead=share)
    end = 0
    for stage in stages(settings):
        end += stage.iterations
        if iteration > end:
            continue
        if stage.block is None:
            whole = replace(model, attention="full", block_length=None)
            return Attention(whole, sampling)
        kind = model.attention if model.has_blocks else "block_causal"
        by_blocks = replace(model, attention=kind, block_length=stage.block)
        return Attention(by_blocks, replace(sampling, block_length=stage.block))
    return Attention(model, sampling)


def attentions(settings: Settings, *, most: int) -> list[tuple[Attention, float]]:
    """Return what tokens see during the supervised phase, each with how many iterations it holds.

    Args:
        most: attentions that stand for `sft.anneal_iterations`, evenly spread.
    """
    annealed, last = settings.sft.anneal_iterations, 0
    count = min(most, annealed)
    places = [(2 * number + 1) * annealed // (2 * count) + 1 for number in range(count)]
    found = [(attention_at(settings, place), annealed / count) for place in places]
    for stage in stages(settings):
        last += stage.iterations
        found.append((attention_at(settings, last), float(stage.iterations)))
    rest = max(0, settings.sft.iterations - annealed - last)
    own = attention_at(settings, annealed + last + 1)
    return [*found, (own, float(rest))] if rest or not found else found


def without_schedule(settings: Settings) -> Settings:
    """Return the settings of a phase in which the model's own attention holds throughout."""
    return replace(settings, sft=replace(settings.sft, anneal_iterations=0, block_schedule=None))


def validate_schedule(settings: Settings) -> None:
    """Check that the schedule of attention fits the model, the layout and the phase.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    sft, model = settings.sft, settings.model
    if not sft.has_schedule:
        return
    key = "anneal_iterations" if sft.anneal_iterations else "block_schedule"
    said, fix = f"sft.{key}={getattr(sft, key)}", {"anneal_iterations": "0"}.get(key, "null")
    none = f"use sft.{key}={fix}"
    if sft.block_schedule == []:
        raise ValueError(f"{said} has no stage; use null, or for example [1x100]")
    if sft.anneal_iterations and sft.block_schedule:
        raise ValueError(
            f"{said} and sft.block_schedule={sft.block_schedule} are two schedules of attention; "
            "use one of them"
        )
    if not sft.is_on and "iterations" not in written(sft):
        raise ValueError(
            f"{said} is for a supervised phase, and sft.iterations=0 has none; set for example "
            f"sft.epochs=1, or {none}"
        )
    taken = scheduled_iterations(settings)
    if 0 < sft.iterations <= taken:
        raise ValueError(
            f"{said} takes {taken} iterations, and sft.iterations={sft.iterations} leaves none for "
            f"the model's own attention; use more than {taken}, or a shorter schedule"
        )
    if sft.loss != "denoising" or sft.autoregressive_weight:
        other = "loss=vrpo" if sft.loss != "denoising" else "autoregressive_weight"
        raise ValueError(
            f"{said} is for the cross-entropy of masked tokens alone, and sft.{other} is set; "
            f"{none}"
        )
    if settings.parallel.context > 1:
        raise ValueError(
            f"{said} needs whole rows on each rank, and parallel.context="
            f"{settings.parallel.context} shares them; use context=1"
        )
    if settings.kernels.batch_invariant:
        raise ValueError(
            f"{said}: kernels.batch_invariant=true has no attention for it; use "
            "kernels.batch_invariant=false"
        )
    if not model.is_known:
        return
    if sft.anneal_iterations and model.has_blocks:
        raise ValueError(
            f"{said} ends with rows whose tokens all see each other, and model.attention="
            f"{model.attention}; use sft.block_schedule, for example [1x100, 2x100]"
        )
    if sft.block_schedule and model.shift:
        raise ValueError(
            f"{said} predicts a block's first token from its own place, and model.shift=true from "
            "the one before; use model.shift=false, or sft.anneal_iterations"
        )
