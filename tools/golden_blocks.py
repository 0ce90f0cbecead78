"""The cases of golden numbers of block-diffusion models, in this project's terms."""

from collections.abc import Iterator
from typing import Any

import torch
from golden import LogitCase, LogprobCase, SamplerCase, below
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.patterns import block_causal, replay
from agrpo_megatron.estimators.steps import rows_at
from agrpo_megatron.trajectories import state_tokens
from agrpo_megatron.types import StepDraws, Trajectory

UNMASKING = {
    "low_confidence_static": "low_confidence",
    "low_confidence_dynamic": "low_confidence",
    "sequential": "leftmost",
}
# Public samplers that rank positions by probabilities before top-k and top-p.
RANKED_BEFORE = ("dare", "bd3")


def ids_and_block(cases: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that a published config.json may lack."""
    mask = cases.get("tokens", {}).get("mask_token_id")
    blocks = [case["block_length"] for case in cases.get("decode", [])]
    block = cases.get("block_length", blocks[0] if blocks else None)
    found = {"mask_token_id": mask, "block_size": block}
    return {key: value for key, value in found.items() if value is not None}


def block_logit_cases(tensors: dict[str, Tensor], block: int) -> Iterator[LogitCase]:
    """Yield whole rows, and clean rows with a partially masked copy, alone and of a packed row."""
    whole = below(tensors, "logits.")
    ids = whole["input_ids"]
    count, length = ids.shape
    lengths, scored = torch.full((count,), length), torch.ones_like(ids, dtype=torch.bool)
    found = {"logits": (whole.get("logits"), block)}
    found |= {
        name: (tensors.get(f"{name}.logits"), n) for name, n in (("full", length), ("block", block))
    }
    for name, (logits, each) in found.items():
        if logits is not None:
            patterns, flat = [block_causal(length, each)] * count, logits.flatten(0, 1)
            yield LogitCase(name, ids, lengths, scored, flat, shift=False, patterns=patterns)
    for group, key in (("train", "ids"), ("bdtrain", "input_ids")):
        if doubled := below(tensors, f"{group}."):
            rows = zip(doubled[f"clean_{key}"], doubled[f"noisy_{key}"], strict=True)
            yield _doubled(group, list(rows), doubled["logits_noisy"].flatten(0, 1), block)
    if packed := below(tensors, "packed."):
        starts = (packed["position_ids_in"][0] == 0).nonzero()[:, 0].tolist()
        bounds = [*_sample_starts(starts), packed["clean_ids"].shape[1]]
        parts = [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        clean, noisy = packed["clean_ids"][0], packed["noisy_ids"][0]
        rows = [(clean[part], noisy[part]) for part in parts]
        yield _doubled("packed", rows, packed["logits_noisy"][0], block)


def _sample_starts(starts: list[int]) -> list[int]:
    """Return where samples begin: a position 0 after a position 0 is padding, one sample in all."""
    return [start for start in starts if start - 1 not in starts]


def _doubled(
    name: str, rows: list[tuple[Tensor, Tensor]], expected: Tensor, block: int
) -> LogitCase:
    lengths = torch.tensor([2 * len(clean) for clean, _ in rows])
    canvas = expected.new_zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    scored = torch.zeros_like(canvas, dtype=torch.bool)
    for number, (clean, noisy) in enumerate(rows):
        canvas[number, : len(clean)], scored[number, len(clean) : 2 * len(clean)] = clean, True
        canvas[number, len(clean) : 2 * len(clean)] = noisy
    patterns = [replay(len(c), block, [(0, len(c))], causal=False) for c, _ in rows]
    return LogitCase(name, canvas, lengths, scored, expected, shift=False, patterns=patterns)


def tracerl_cases(
    cases: dict[str, Any], tensors: dict[str, Tensor], block: int
) -> Iterator[LogprobCase]:
    """Yield the rounds of TraceRL's trainer, without the padding of its prompts."""
    about = cases.get("tracerl")
    if about is None:
        return
    width, count = about["L0"], about["L1"]
    for case in about["cases"]:
        part = below(tensors, f"tracerl.s{case['shrink']}.")
        sizes = [about["prompt_lengths"][row] for row in case["row_of_round"]]
        rows = part["input_ids"]
        lengths = torch.tensor([size + 2 * count for size in sizes])
        canvas = torch.zeros_like(rows)
        scored = torch.zeros_like(rows, dtype=torch.bool)
        for number, size in enumerate(sizes):
            canvas[number, : size + 2 * count] = rows[number, width - size :]
            targets = part["target_mask"][number, width:]
            scored[number, size + count : size + 2 * count] = targets
        is_target = part["target_mask"]
        yield LogprobCase(
            f"tracerl shrink {case['shrink']}",
            canvas,
            lengths,
            scored,
            rows[:, : width + count][is_target],
            part["logp"][is_target],
            [
                replay(size + count, block, [(size, count)], causal=False, origin=size % block)
                for size in sizes
            ],
        )


def decode_cases(cases: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[SamplerCase]:
    """Yield the decodes; sampled ones with the noise of the public sampler."""
    for number, case in enumerate(cases.get("decode", [])):
        part = below(tensors, f"decode.{number}.")
        if "version" in case:
            yield _llada2(f"decode {number}", case, part)
            continue
        prompt, output = part["prompt_ids"], part["output_ids"]
        size, block = prompt.shape[1], case["block_length"]
        width = output.shape[1] - size
        sampling = SamplingSettings(
            completion_length=width,
            block_length=block,
            block_origin="row",
            denoising_steps=width // block * case["denoising_steps"],
            unmasking=UNMASKING[case["strategy"]],
            temperature=case["temperature"],
            top_k=case["top_k"],
            top_p=case["top_p"],
            threshold=case["threshold"],
            confidence="tempered" if case["sampler"] in RANKED_BEFORE else "policy",
            early_end=False,
            end_at_stop=True,
            forbid_mask_token=False,
        )
        steps = part["step"][None, size:].long()
        detail = f"{case['strategy']}, {case['denoising_steps']} steps a block"
        yield SamplerCase(
            f"decode {number}",
            [prompt[0]],
            output[:, size:],
            sampling,
            detail,
            steps=torch.where(steps > 0, steps - 1, -1),
            stop_ids=tuple(case["stop_ids"]),
            gumbels=_gumbels(part, width) if "noise" in part else None,
        )


def _llada2(name: str, case: dict[str, Any], part: dict[str, Tensor]) -> SamplerCase:
    """Return a decode of LLaDA2.0 or 2.1; its canvas ends with a whole block."""
    prompt, canvas, block = part["prompt_ids"], part["canvas"], case["block_length"]
    size, edits = prompt.shape[1], case["version"] == "2.1"
    width = canvas.shape[1] - size
    if edits:
        steps = -(-block // case["num_to_transfer"])
    else:
        steps = min(case["steps"], case["gen_length"] // case["minimal_topk"])
    sampling = SamplingSettings(
        completion_length=width,
        block_length=block,
        block_origin="row",
        denoising_steps=width // block * steps,
        unmasking="low_confidence",
        temperature=case["temperature"],
        top_k=case["top_k"],
        top_p=case["top_p"] or 1.0,
        threshold=case["threshold"],
        edit_threshold=case["editing_threshold"] if edits else None,
        edit_steps=case["max_post_steps"] if edits else SamplingSettings.edit_steps,
        early_end=False,
        end_at_stop=case["eos_early_stop"] or not edits,
        forbid_mask_token=False,
    )
    return SamplerCase(
        name,
        [prompt[0]],
        canvas[:, size:],
        sampling,
        f"LLaDA{case['version']}, {steps} steps a block, {case['forward_calls']} forwards",
        stop_ids=(case["eos_id"],),
        inputs=part["forward_inputs"].long(),
    )


def wrong_states(case: SamplerCase, ours: Trajectory, mask_id: int) -> int:
    """Return the tokens of the states before all steps that differ from the forwards' inputs.

    Every input is a row up to the end of the open block; one forward more or less is an error, too.
    """
    assert case.inputs is not None
    count = min(len(case.inputs), int(ours.num_steps[0]))
    steps = torch.arange(count, device=case.inputs.device)
    draws = StepDraws(torch.zeros_like(steps), steps, torch.ones(count, device=steps.device))
    states = state_tokens(ours, rows_at(ours, draws), steps, mask_id=mask_id)
    rows = torch.cat([case.prompts[0].expand(count, -1), states], 1)
    inputs = case.inputs[:count]
    wrong = int(((rows != inputs) & (inputs >= 0)).sum())
    return wrong + abs(len(case.inputs) - int(ours.num_steps[0]))


def _gumbels(part: dict[str, Tensor], width: int) -> Tensor:
    """Return the noise [steps, 1, C, vocabulary] of a decode; its public form is exponential."""
    noise, size = -part["noise"].double().log(), part["prompt_ids"].shape[1]
    found = noise.new_zeros(len(noise), size + width, noise.shape[-1])
    for step, start in enumerate(part["forward_start"].tolist()):
        found[step, start : start + noise.shape[1]] = noise[step]
    return found[:, None, size:]
