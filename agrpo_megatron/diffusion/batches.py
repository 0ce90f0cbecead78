"""Build micro-batches: drawn steps of rollouts, and masked examples, as packed rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings, SftSettings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.blocks import block_offsets, doubled_row
from agrpo_megatron.diffusion.packing import completion_columns, make_canvas, pack, unscored_row
from agrpo_megatron.diffusion.patterns import ahead, row_length
from agrpo_megatron.trajectories import state_tokens, weights_of_kl
from agrpo_megatron.types import (
    PackedRows,
    Rollout,
    ScoredRows,
    SftBatch,
    TimestepBatch,
    Trajectory,
)


def row_lengths(rollout: Rollout, scored: ScoredRows) -> Tensor:
    """Return the number of tokens of each row [N]: prompt and completion."""
    trajectory = rollout.trajectory
    prompts = torch.tensor([len(p) for p in trajectory.prompts], dtype=torch.int64)
    width = trajectory.tokens.shape[1] if scored.length is None else scored.length.cpu()
    return prompts[scored.rollout.cpu()] + width


def timestep_batch(
    rollout: Rollout,
    scored: ScoredRows,
    rows: Tensor,
    *,
    mask_id: int,
    shift: bool = False,
    packed: PackedRows | None = None,
) -> TimestepBatch:
    """Pack one micro-batch: some of the scored rows.

    Args:
        rows: [n] indices of scored rows; without any, the batch has weight 0.
        packed: their tokens, for a block model; None: each row has all of its own.
    """
    trajectory, rows = rollout.trajectory, rows.to(scored.rollout.device)
    source, target = scored.rollout[rows], scored.scored[rows]
    row, position = target.nonzero(as_tuple=True)
    owner, number = source[row], rows[row]
    gains = rollout.advantages[owner]
    if scored.advantage is not None:
        gains = scored.advantage[number].to(gains.dtype)
    targets = trajectory.tokens[source] if scored.targets is None else scored.targets[rows]
    old = recorded_logprobs(rollout, scored, rows)
    if packed is None:
        prompts = _states_of_prompts(rollout, scored, rows, mask_id)
        length = None if scored.length is None else scored.length[rows]
        states = state_tokens(trajectory, scored, rows, mask_id=mask_id)
        packed = _packed(prompts, states, target, length=length, mask_id=mask_id, shift=shift)
    return TimestepBatch(
        rows=packed,
        targets=targets[row, position],
        support_ids=_supports(trajectory, scored, number, position),
        old_logprobs=None if old is None else old[row, position],
        reference_logprobs=None,
        advantages=gains,
        **weights_of(scored, number, position),
        sources=owner,
        row=number,
        position=position,
    )


def weights_of(scored: ScoredRows, number: Tensor, position: Tensor) -> dict[str, Tensor]:
    """Return the float32 weights [S] of scored tokens, and of their KL: fields of a micro-batch.

    Args:
        number, position: [S] of the tokens, the scored row and the place in the completion.
    """
    spots = number, position
    of_kl = weights_of_kl(scored)[spots]
    if scored.coefficient is not None:  # there, it is of a single token in an exact KL only
        of_kl = of_kl * scored.coefficient[spots]
    return {"weights": scored.weight[spots].float(), "kl_weights": of_kl.float()}


def recorded_logprobs(
    rollout: Rollout, scored: ScoredRows, rows: Tensor | slice = slice(None)
) -> Tensor | None:
    """Return the log-probs with which the sampler drew the targets, [n, C]; None: not known.

    Args:
        rows: [n] indices of scored rows; by default all.
    """
    if not scored.is_sampled:
        return None
    if scored.target_logprobs is not None:
        return scored.target_logprobs[rows]
    return rollout.trajectory.logprobs[scored.rollout[rows]]


def _supports(
    trajectory: Trajectory, scored: ScoredRows, number: Tensor, position: Tensor
) -> Tensor | None:
    """Return the candidates [S, K] from which the sampler drew targets; None: all ids.

    Args:
        number, position: [S] of the targets, the scored row and the place in the completion.
    """
    if not scored.is_sampled or trajectory.support_ids is None:
        return None
    owner = scored.rollout[number]
    support = trajectory.support_ids[owner, position]
    edited = trajectory.edit_support_ids
    if scored.step is None or edited is None:
        return support
    assert trajectory.edit_step is not None
    assert trajectory.edit_position is not None
    is_mine = trajectory.edit_step[owner] == scored.step[number, None]
    is_mine &= trajectory.edit_position[owner] == position[:, None]
    found = edited[owner, is_mine.long().argmax(1)]
    missing = support.shape[1] - found.shape[1]
    support, found = (
        F.pad(ids, (0, max(0, more)), value=-1)
        for ids, more in ((support, -missing), (found, missing))
    )
    return found.where(is_mine.any(1, keepdim=True), support)


def _states_of_prompts(
    rollout: Rollout, scored: ScoredRows, rows: Tensor, mask_id: int
) -> list[Tensor]:
    """Return the prompts of rows, with the mask token at their hidden positions."""
    prompts = [rollout.trajectory.prompts[r] for r in scored.rollout[rows].tolist()]
    if scored.hidden_prompt is None:
        return prompts
    hidden = [scored.hidden_prompt[row] for row in rows.tolist()]
    return [p.masked_fill(h, mask_id) for p, h in zip(prompts, hidden, strict=True)]


def _packed(
    prompts: Sequence[Tensor],
    completions: Tensor,
    scored: Tensor,
    *,
    length: Tensor | None = None,
    mask_id: int,
    shift: bool,
) -> PackedRows:
    """Pack prompts with completions [n, C]; `scored` [n, C] marks tokens that reach the head.

    Args:
        length: [n] tokens that are kept of each completion; None keeps all.
    """
    if not len(completions):
        return unscored_row(mask_id, completions.device)
    canvas, prompt_lengths = make_canvas(prompts, completions)
    columns = completion_columns(prompt_lengths, completions.shape[1])
    marks = torch.zeros_like(canvas, dtype=torch.bool).scatter_(1, columns, scored)
    kept = completions.shape[1] if length is None else length
    return pack(canvas, prompt_lengths + kept, marks, shift=shift)


def sft_loss(logprobs: Tensor, batch: SftBatch) -> Tensor:
    """Return the weighted cross-entropy, summed over examples; the caller divides it.

    With weights 1 / (t * length) this bounds each example's mean negative log-likelihood per
    response token, in nats. Source: LLaDA (arXiv 2502.09992), equation 5.
    """
    return -(logprobs * batch.weights).sum()


@dataclass(frozen=True)
class Responses:
    """The responses of examples, side by side."""

    tokens: Tensor  # [B, C] int64
    lengths: Tensor  # [B] int64, on the host: tokens of the example; padding follows them
    trained: Tensor  # [B, C] bool, none beyond the length and at least one of each example


def whole_responses(tokens: Tensor) -> Responses:
    """Return responses [B, C] of which all tokens are trained."""
    lengths = torch.full((len(tokens),), tokens.shape[1])
    return Responses(tokens, lengths, torch.ones_like(tokens, dtype=torch.bool))


def sft_lengths(
    prompts: Sequence[Tensor], lengths: Tensor, model: ModelSettings, sampling: SamplingSettings
) -> Tensor:
    """Return the tokens [B] of the packed rows of examples with responses of `lengths` [B]."""
    sizes = torch.tensor([len(prompt) for prompt in prompts])
    if not model.has_blocks:
        return sizes + lengths
    return sizes + 2 * lengths + block_offsets(sizes, sampling)


def sft_batches(
    prompts: Sequence[Tensor],
    responses: Responses,
    example_ids: Tensor,
    micro_batches: Sequence[Tensor],
    *,
    mask_id: int,
    sft: SftSettings,
    seed: int,
    model: ModelSettings | None = None,
    sampling: SamplingSettings | None = None,
    share: float | None = None,
) -> list[SftBatch]:
    """Mask responses at a rate t ~ U(mask_epsilon, 1) each, and pack them.

    Each of an example's n trained tokens is masked with probability t and weighs 1 / (t * n).
    End-of-text padding is part of the response. Source: LLaDA (arXiv 2502.09992), section 2.3.
    Other tokens of a response, such as later turns of the user, stay. A block model sees the
    whole example, and after it the masked response, each block of which sees the example before it:
    the rows and the loss of SDAR's training code. With an `autoregressive_weight` each response
    token is also predicted from the example's token before it, if it is trained, and weighs
    `autoregressive_weight` / n, a masked one `diffusion_weight` / (t * n): the loss of
    Nemotron-Labs-Diffusion.

    Args:
        example_ids: [B] noise indices: the mask of an index is the same under any layout.
        micro_batches: indices of each batch's examples; without any, the batch has weight 0.
        model: its shift and its attention; None: tokens see all and are predicted in place.
        sampling: where blocks begin, for a block model.
        share: of the tokens after its own that a token sees; None: what the model's attention says.
    """
    model, sampling = model or ModelSettings(), sampling or SamplingSettings()
    tokens, trained = responses.tokens, responses.trained
    places = torch.arange(tokens.shape[1], device=tokens.device)
    row_key = noise.noise_key(seed, noise.MASKS, example_ids)
    rate = sft.mask_epsilon + (1 - sft.mask_epsilon) * noise.uniform(row_key)
    chance = noise.uniform(noise.fold(row_key[:, None], places))
    masked = (chance < rate[:, None]) & trained
    follows = trained & (sft.autoregressive_weight > 0)
    weight = torch.cat(
        [
            torch.full_like(rate, sft.autoregressive_weight)[:, None].expand_as(masked),
            (sft.diffusion_weight / rate)[:, None].expand_as(masked),
        ],
        1,
    )
    weight = weight / trained.sum(1, keepdim=True)
    targets, scored = torch.cat([tokens, tokens], 1), torch.cat([follows, masked], 1)
    batches = []
    for chunk in micro_batches:
        mine, part = scored[chunk], [prompts[i] for i in chunk.tolist()]
        lengths = responses.lengths[chunk]
        rows = _sft_rows(part, tokens[chunk], lengths, mine, mask_id, model, sampling)
        if share is not None:
            patterns = [ahead(end - start, share) for start, end in pairwise(rows.bounds)]
            rows = replace(rows, patterns=patterns)
        sources = chunk.to(mine.device)[mine.nonzero()[:, 0]]
        weights = weight[chunk][mine].float()
        batches.append(SftBatch(rows, targets[chunk][mine], weights, sources))
    return batches


def _sft_rows(
    prompts: Sequence[Tensor],
    responses: Tensor,
    lengths: Tensor,
    scored: Tensor,
    mask_id: int,
    model: ModelSettings,
    sampling: SamplingSettings,
) -> PackedRows:
    """Pack masked responses [n, C] after their prompts, or after whole examples.

    Args:
        lengths: [n] tokens of each response, on the host.
        scored: [n, 2 C]: tokens that the one before predicts in the example; masked tokens.
    """
    follows, masked = scored.chunk(2, dim=1)
    states = responses.masked_fill(masked, mask_id)
    if not model.has_blocks or not len(states):
        kept = lengths.to(states.device)
        return _packed(prompts, states, masked, length=kept, mask_id=mask_id, shift=model.shift)
    contexts, patterns = [], []
    for prompt, response, length in zip(prompts, responses, lengths.tolist(), strict=True):
        whole = torch.cat([prompt, response[:length]])
        patterns.append(doubled_row(len(prompt), len(whole), model, sampling))
        contexts.append(torch.cat([whole, prompt[patterns[-1][1].start :]]))
    canvas, before = make_canvas(contexts, states)
    columns = completion_columns(before, states.shape[1])
    marks = torch.zeros_like(canvas, dtype=torch.bool).scatter_(1, columns, masked)
    first = torch.tensor([len(prompt) for prompt in prompts], device=canvas.device)
    before_marks = torch.zeros_like(marks)
    marks |= before_marks.scatter_(1, completion_columns(first - 1, states.shape[1]), follows)
    lengths = torch.tensor([row_length(pattern) for pattern in patterns], device=canvas.device)
    return pack(canvas, lengths, marks, patterns=patterns)
