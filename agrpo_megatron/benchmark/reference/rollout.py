"""The published rollout: every row runs whole, with the logits of every position, in every step.

Written from the description of AGRPO's sampler (`generate.py` of github.com/probablyabot/agrpo at
98f1182), pass by pass over the vocabulary. Of a step's logits over all positions, the block's are
cut out, tempered and truncated, with a bool mask of what is kept. Tokens are drawn by the
Gumbel-max rule with noise in float64. Entropies come from a log-softmax, and log-probs from a
log-sum-exp of their own. The masks of the tokens that a step fixes are stored. Rows whose last
block is all end-of-text leave the batch before the next block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from agrpo_megatron.benchmark.reference.model import Reference, logits_of
from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.schedule import step_counts


class Noise(NamedTuple):
    """Where random numbers come from: uniform float64 numbers, by rows [n], step and positions."""

    tokens: Callable[[Tensor, int, Tensor], Tensor]  # [n, block length, V]
    positions: Callable[[Tensor, int, Tensor], Tensor]  # [n, block length]


@dataclass(frozen=True)
class Rollouts:
    """B completions, and what their update needs."""

    prompts: Tensor  # [B, P] ids
    tokens: Tensor  # [B, C] ids
    unmask_step: Tensor  # [B, C] step that fixed each
    num_steps: Tensor  # [B] steps that ran
    logprobs: Tensor  # [B, C] float32
    entropies: Tensor  # [B, C] float32
    support: Tensor  # [B, C, V] bool, what top-k and top-p kept; all where no token was drawn
    forwards: int = 0  # forward passes
    rows: int = 0  # of all forward passes together


def fresh_noise(vocab: int, device: torch.device) -> Noise:
    """Return the noise of a generator, as the published code draws it."""

    def tokens(rows: Tensor, step: int, positions: Tensor) -> Tensor:
        shape = (len(rows), len(positions), vocab)
        return torch.rand(shape, dtype=torch.float64, device=device)

    def positions_(rows: Tensor, step: int, positions: Tensor) -> Tensor:
        return torch.rand(len(rows), len(positions), dtype=torch.float64, device=device)

    return Noise(tokens, positions_)


@dataclass
class _State:
    """Rows under construction; changed in place, step by step."""

    canvas: Tensor  # [B, P + C] ids
    unmask_step: Tensor  # [B, C]; -1 where still masked
    logprobs: Tensor  # [B, C]
    entropies: Tensor  # [B, C]
    support: Tensor  # [B, C, V]
    num_steps: Tensor  # [B]
    width: int  # tokens of a prompt
    rows: int = 0  # of all forward passes


@torch.no_grad()
def rollout(
    reference: Reference, prompts: Tensor, sampling: SamplingSettings, noise: Noise
) -> Rollouts:
    """Complete prompts [B, P] of one length."""
    state = _start(reference, prompts, sampling)
    live, step = torch.arange(len(prompts), device=prompts.device), 0
    eos_id = reference.model.eos_token_id
    for first in range(0, sampling.completion_length, sampling.block_length):
        block = torch.arange(first, first + sampling.block_length, device=prompts.device)
        if first and sampling.early_end:
            before = state.canvas[live][:, state.width + block - sampling.block_length]
            live = live[~(before == eos_id).all(1)]
            if not len(live):
                break
        for fixes in step_counts(sampling):
            _denoise(state, reference, sampling, noise, live, block, step, fixes)
            step += 1
    tokens, tail = state.canvas[:, state.width :], state.unmask_step < 0
    if eos_id is not None:
        tokens = tokens.masked_fill(tail, eos_id)
    unmask_step = torch.where(tail, state.num_steps[:, None], state.unmask_step)
    records = state.num_steps, state.logprobs, state.entropies, state.support
    return Rollouts(prompts, tokens, unmask_step, *records, forwards=step, rows=state.rows)


def _start(reference: Reference, prompts: Tensor, sampling: SamplingSettings) -> _State:
    model, device = reference.model, prompts.device
    assert model.mask_token_id is not None and model.vocab_size is not None
    shape = (len(prompts), sampling.completion_length)
    masks = torch.full(shape, model.mask_token_id, dtype=torch.int64, device=device)
    return _State(
        canvas=torch.cat([prompts, masks], dim=1),
        unmask_step=torch.full_like(masks, -1),
        logprobs=torch.zeros(shape, device=device),
        entropies=torch.zeros(shape, device=device),
        support=torch.ones(*shape, model.vocab_size, dtype=torch.bool, device=device),
        num_steps=torch.zeros_like(masks[:, 0]),
        width=prompts.shape[1],
    )


def _denoise(
    state: _State,
    reference: Reference,
    sampling: SamplingSettings,
    noise: Noise,
    live: Tensor,
    block: Tensor,
    step: int,
    fixes: int,
) -> None:
    """Run one denoising step of the live rows, which fixes some positions of a block."""
    mask_id = reference.model.mask_token_id
    assert mask_id is not None
    logits = logits_of(reference, state.canvas[live])  # [n, P + C, V]
    first = state.width + int(block[0])
    policy = tempered(logits[:, first : first + len(block)].float(), sampling, mask_id)
    kept = _cut(policy, sampling)
    drawn = _draw(policy, noise.tokens(live, step, block))
    logs = policy.log_softmax(-1)
    spread = -torch.where(logs.isfinite(), logs.exp() * logs, 0.0).sum(-1)
    chosen = logprobs_of(policy, drawn)
    rank = _rank(sampling, chosen, spread, noise.positions(live, step, block), block)
    rank = rank.masked_fill(state.unmask_step[live][:, block] >= 0, float("-inf"))
    places = rank.argsort(dim=1, descending=True, stable=True)[:, :fixes]
    picked = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, places, value=True)
    row, place = picked.nonzero(as_tuple=True)
    row, spot = live[row], block[place]
    state.canvas[row, state.width + spot] = drawn[picked]
    state.unmask_step[row, spot] = step
    state.logprobs[row, spot] = chosen[picked]
    state.entropies[row, spot] = spread[picked]
    state.support[row, spot] = kept[picked]
    state.rows += len(live)
    state.num_steps[live] = step + 1


def tempered(logits: Tensor, sampling: SamplingSettings, mask_id: int) -> Tensor:
    """Divide float32 logits [..., V] by the temperature, in place; -inf for what is never drawn."""
    logits /= sampling.temperature
    if sampling.forbid_mask_token:
        logits[..., mask_id] = float("-inf")
    return logits


def logprobs_of(policy: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probs [...] of tokens [...] under logits [..., V], a log-sum-exp a row.

    Source: TRL's `selective_log_softmax`, which the published code calls.
    """
    chosen = policy.gather(-1, tokens[..., None]).squeeze(-1)
    return chosen - torch.stack([row.logsumexp(-1) for row in policy])


def _cut(policy: Tensor, sampling: SamplingSettings) -> Tensor:
    """Set logits [..., V] that top-k and top-p leave out to -inf; returns what they keep, bool."""
    kept = torch.ones_like(policy, dtype=torch.bool)
    if sampling.top_k is not None:
        least = policy.topk(min(sampling.top_k, policy.shape[-1]), dim=-1).values[..., -1:]
        left = policy < least
        policy.masked_fill_(left, float("-inf"))
        kept &= ~left
    if sampling.top_p < 1:
        ordered, ids = policy.sort(dim=-1, descending=True)
        chances = ordered.softmax(-1)
        left = chances.cumsum(-1) - chances > sampling.top_p
        left = torch.zeros_like(left).scatter(-1, ids, left)
        policy.masked_fill_(left, float("-inf"))
        kept &= ~left
    return kept


def _draw(policy: Tensor, uniforms: Tensor) -> Tensor:
    """Draw tokens [n, block length] from logits [n, block length, V], by Gumbel-max.

    Args:
        uniforms: float64, of the logits' shape.
    """
    return (policy.exp() / -uniforms.log()).argmax(-1)


def _rank(
    sampling: SamplingSettings, chosen: Tensor, spread: Tensor, uniforms: Tensor, block: Tensor
) -> Tensor:
    """Return the score [n, block length] of each position: the highest are fixed."""
    scores = {
        "random": lambda: uniforms,
        "leftmost": lambda: -block.double().expand_as(uniforms),
        "low_confidence": lambda: chosen.double(),
        "entropy": lambda: -spread.double(),
    }
    return scores[sampling.unmasking]()
