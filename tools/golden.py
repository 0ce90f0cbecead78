"""The cases of a directory of golden numbers, in this project's terms; for conformance.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.types import Row

DREAM_UNMASKING = {
    "origin": "bernoulli",
    "maskgit_plus": "low_confidence",
    "entropy": "entropy",
    "topk_margin": "margin",
}


@dataclass(frozen=True)
class LogitCase:
    """Rows, and the logits of some of their tokens, in order."""

    name: str
    canvas: Tensor  # [R, L] rows without padding, left-aligned
    lengths: Tensor  # [R]
    scored: Tensor  # [R, L]
    expected: Tensor  # [S, V]
    shift: bool
    patterns: list[Row] | None = None


@dataclass(frozen=True)
class LogprobCase:
    """Rows, and the log-probs of some of their tokens, in order."""

    name: str
    canvas: Tensor  # [R, L] left-aligned
    lengths: Tensor  # [R]
    scored: Tensor  # [R, L]
    targets: Tensor  # [S]
    expected: Tensor  # [S]
    patterns: list[Row]


@dataclass(frozen=True)
class SamplerCase:
    """Prompts and their completions by the public sampler."""

    name: str
    prompts: list[Tensor]
    expected: Tensor  # [R, C]
    sampling: SamplingSettings
    detail: str
    uniforms: Tensor | None = None  # [steps, R, C]
    gumbels: Tensor | None = None  # [steps, R, C, V], the noise of tokens
    steps: Tensor | None = None  # [R, C] that fixed each token, from 0; -1: none did
    stop_ids: tuple[int, ...] = ()
    inputs: Tensor | None = None  # [calls, L] row of each forward of one prompt; -1: not in it


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix; the new names are without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def logit_cases(tensors: dict[str, Tensor]) -> Iterator[LogitCase]:
    """Yield full rows, then rows with their padding removed; raw and shifted logits."""
    for group in ("logits", "leftpad", "hole"):
        part = below(tensors, f"{group}.")
        if not part:
            continue
        ids = part["input_ids"]
        is_real = part.get("attention_mask", torch.ones_like(ids)).bool()
        lengths = is_real.sum(1)
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        canvas = torch.zeros_like(ids).masked_scatter(valid, ids[is_real])
        yield LogitCase(group, canvas, lengths, valid, part["logits"][is_real], shift=False)
        if "shifted_logits" in part:
            # Only the reference predicts the token after a pad from the pad.
            follows = torch.cat([torch.ones_like(is_real[:, :1]), is_real[:, :-1]], 1)
            kept = torch.zeros_like(valid).masked_scatter(valid, follows[is_real])
            expected = part["shifted_logits"][is_real & follows]
            yield LogitCase(f"{group} shifted", canvas, lengths, kept, expected, shift=True)


def sampler_cases(cases: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[SamplerCase]:
    """Yield the cases of LLaDA's or of Dream's sampler."""
    for number, case in enumerate(cases.get("sampler", [])):
        part = {**below(tensors, "sampler."), **below(tensors, f"sampler.{number}.")}
        make = _dream if "alg" in case else _llada
        yield make(f"sampler {number}", case, part)


def _llada(name: str, case: dict[str, Any], part: dict[str, Tensor]) -> SamplerCase:
    prompts = part["prompt_ids"]
    sampling = SamplingSettings(
        completion_length=case["gen_length"],
        block_length=case["block_length"],
        denoising_steps=case["steps"],
        unmasking=case["remasking"],
        temperature=case["temperature"],
        confidence="untempered",
        early_end=False,
        forbid_mask_token=False,
    )
    detail = f"{case['steps']} steps, block {case['block_length']}"
    expected = part["output_ids"][:, prompts.shape[1] :]
    return SamplerCase(name, list(prompts), expected, sampling, detail)


def _dream(name: str, case: dict[str, Any], part: dict[str, Tensor]) -> SamplerCase:
    ids, length = part["prompt_ids"], case["max_new_tokens"]
    is_real = part.get("attention_mask", torch.ones_like(ids)).bool()
    sampling = SamplingSettings(
        completion_length=length,
        block_length=length,
        denoising_steps=case["steps"],
        schedule="dream",
        unmasking=DREAM_UNMASKING[case["alg"]],
        temperature=case["temperature"],
        top_k=case["top_k"],
        top_p=case["top_p"] or 1.0,
        truncation="top_p_first",
        early_end=False,
        forbid_mask_token=False,
    )
    uniforms = part.get("uniforms")
    return SamplerCase(
        name,
        [row[real] for row, real in zip(ids, is_real, strict=True)],
        part["output_ids"][:, ids.shape[1] :],
        sampling,
        f"{case['alg']}, {case['steps']} steps",
        None if uniforms is None else uniforms[:, :, ids.shape[1] :],
    )
