"""Build micro-batches of masked examples as packed rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings, SftSettings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.batches import packed_states
from agrpo_megatron.diffusion.blocks import block_offsets, doubled_row
from agrpo_megatron.diffusion.packing import completion_columns, make_canvas, pack
from agrpo_megatron.diffusion.patterns import ahead, row_length
from agrpo_megatron.diffusion.supervised.documents import parts_of
from agrpo_megatron.types import PackedRows, SftBatch


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
    # Places of each example, counted from its prompt, at which a text begins that sees none of
    # those before it, and is not seen; the first token of each is not trained. None: no text does.
    cuts: Sequence[Sequence[int]] | None = None


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
    drawn = _Drawn(prompts, responses, targets, scored, weight)
    return [
        _sft_batch(drawn, chunk, mask_id=mask_id, model=model, sampling=sampling, share=share)
        for chunk in micro_batches
    ]


class _Drawn(NamedTuple):
    """Examples with their masks."""

    prompts: Sequence[Tensor]
    responses: Responses
    targets: Tensor  # [B, 2 C], of the next tokens, then of masked ones
    scored: Tensor  # [B, 2 C] bool
    weight: Tensor  # [B, 2 C]


def _sft_batch(
    drawn: _Drawn,
    chunk: Tensor,
    *,
    mask_id: int,
    model: ModelSettings,
    sampling: SamplingSettings,
    share: float | None,
) -> SftBatch:
    """Pack one micro-batch: some of the examples."""
    responses, prompts = drawn.responses, [drawn.prompts[i] for i in chunk.tolist()]
    lengths, tokens = responses.lengths[chunk], responses.tokens[chunk]
    tables = [table[chunk] for table in (drawn.targets, drawn.scored, drawn.weight)]
    sources = chunk.to(tokens.device)
    if responses.cuts is not None:
        cuts = [responses.cuts[i] for i in chunk.tolist()]
        parts = parts_of(prompts, tokens, lengths, cuts)
        prompts, lengths, sources = parts.prompts, parts.lengths, sources[parts.row]
        tokens = parts.of(tokens)
        tables = [torch.cat([parts.of(h) for h in table.chunk(2, 1)], 1) for table in tables]
    targets, scored, weight = tables
    rows = _sft_rows(prompts, tokens, lengths, scored, mask_id, model, sampling)
    if share is not None:
        patterns = [ahead(end - start, share) for start, end in pairwise(rows.bounds)]
        rows = replace(rows, patterns=patterns)
    owner = sources[scored.nonzero()[:, 0]]
    return SftBatch(rows, targets[scored], weight[scored].float(), owner)


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
        given = {"length": kept, "mask_id": mask_id, "shift": model.shift}
        return packed_states(prompts, states, masked, **given)
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
