"""The examples of an iteration: rows of `sft.data`, or solutions of the task's problems.

They depend on the seed and the iteration only, so a resumed run and any layout learn the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from agrpo_megatron.config.annealing import Attention
from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.supervised.examples import (
    Responses,
    sft_batches,
    sft_lengths,
    whole_responses,
)
from agrpo_megatron.megatron.layers.context import local_part
from agrpo_megatron.rollout.data_order import pick_problems
from agrpo_megatron.rollout.requests import encode_prompts
from agrpo_megatron.rollout.session import Run
from agrpo_megatron.tasks.base import task_prompts
from agrpo_megatron.tasks.curriculum import epoch_size, solved_problems
from agrpo_megatron.tasks.supervised.example import Example
from agrpo_megatron.tasks.supervised.examples import Supervised, padded_length
from agrpo_megatron.text.replies import TokenRow
from agrpo_megatron.training.step import my_micro_batches
from agrpo_megatron.types import SftBatch


@dataclass(frozen=True)
class Drawn:
    """Examples in order; the same on every rank."""

    prompts: list[Tensor]
    responses: Responses
    names: list[str]  # for messages


@dataclass(frozen=True)
class Stream:
    """All examples of the phase in their order: an example depends only on its place."""

    draw: Callable[[range], Drawn]
    epoch: float  # examples in one epoch


def open_stream(run: Run) -> Stream:
    """Return the examples that the run learns from."""
    if run.supervised is not None:
        data = run.supervised
        return Stream(lambda places: _draw_rows(run, data, places), data.epoch)
    problems, shares = solved_problems(run.task, run.settings.sft)

    def draw(places: range) -> Drawn:
        picked = pick_problems(shares, places, seed=run.settings.run.seed)
        chosen = [problems[place] for place in picked]
        prompts = encode_prompts(run, task_prompts(run.task, chosen, split="train"))
        solutions = _padded(run, [problem.solution for problem in chosen])
        return Drawn(prompts, whole_responses(solutions), [problem.key for problem in chosen])

    return Stream(draw, epoch_size(shares))


def micro_batches(
    run: Run, drawn: Drawn, ids: Tensor, *, seed: int, attention: Attention | None = None
) -> tuple[list[SftBatch], int]:
    """Return this rank's micro-batches, and the tokens of all ranks.

    Args:
        ids: [B] noise indices of the examples, see `sft_batches`.
        attention: what tokens see; None: the model's own.
    """
    settings, ranks = run.settings, run.ranks
    sees = attention or Attention(settings.model, settings.sampling)
    lengths = sft_lengths(drawn.prompts, drawn.responses.lengths, sees.model, sees.sampling)
    batches = sft_batches(
        drawn.prompts,
        drawn.responses,
        ids,
        my_micro_batches(lengths, settings.model, ranks, budget=settings.train.token_budget),
        mask_id=run.mask_id,
        sft=settings.sft,
        seed=seed,
        model=sees.model,
        sampling=sees.sampling,
        share=sees.ahead,
    )
    return [local_part(batch, ranks) for batch in batches], int(lengths.sum())


def join_rows(
    rows: Sequence[TokenRow],
    names: list[str],
    *,
    padding: str | None,
    sampling: SamplingSettings,
    eos_id: int,
    device: torch.device,
    apart: bool = False,
) -> Drawn:
    """Return rows as prompts and responses, with padding that is trained; see `sft.padding`.

    Args:
        apart: whether a text begins after each end-of-text that the one before does not see.
    """
    longest = max(len(row.ids) for row in rows)
    ends = [padded_length(row, padding, sampling, longest=longest) for row in rows]
    lengths = torch.tensor([end - row.prompt for row, end in zip(rows, ends, strict=True)])
    tokens = torch.full((len(rows), int(lengths.max())), eos_id)
    trained = torch.arange(tokens.shape[1]) < lengths[:, None]
    for number, row in enumerate(rows):
        count = len(row.ids) - row.prompt
        tokens[number, :count] = torch.from_numpy(row.ids[row.prompt :])
        trained[number, :count] = torch.from_numpy(row.trained[row.prompt :])
    prompts = [torch.from_numpy(row.ids[: row.prompt]).long().to(device) for row in rows]
    cuts = [(numpy.flatnonzero(r.ids[:-1] == eos_id) + 1).tolist() for r in rows] if apart else None
    return Drawn(prompts, Responses(tokens.to(device), lengths, trained.to(device), cuts), names)


def held_out_rows(run: Run, examples: Sequence[Example]) -> Drawn:
    """Return all rows of held-out examples, with no padding but to the end of a block."""
    rows = [(example, row) for example in examples for row in example.rows]
    return join_rows(
        [row for _, row in rows],
        [example.name for example, _ in rows],
        padding="block" if run.settings.sft.padding == "block" else "none",
        sampling=run.settings.sampling,
        eos_id=run.eos_id,
        device=run.ranks.device,
        apart=run.settings.sft.has_texts and run.settings.sft.document_mask,
    )


def _draw_rows(run: Run, data: Supervised, places: range) -> Drawn:
    """Return the rows at places of the phase.

    Of several replies of an example one is drawn; of a pair both texts are, the chosen one first.
    """
    settings, seed = run.settings, run.settings.run.seed
    picked = pick_problems(data.shares, places, seed=seed)
    chosen = [data.train[place] for place in picked]
    chance = noise.uniform(noise.noise_key(seed, noise.REPLIES, torch.tensor(places)))
    rows = [
        (example, row)
        for example, share in zip(chosen, chance.tolist(), strict=True)
        for row in (
            example.rows
            if settings.sft.loss == "vrpo"
            else [example.rows[int(share * len(example.rows))]]
        )
    ]
    return join_rows(
        [row for _, row in rows],
        [example.name for example, _ in rows],
        padding=settings.sft.padding,
        sampling=settings.sampling,
        eos_id=run.eos_id,
        device=run.ranks.device,
        apart=run.settings.sft.has_texts and run.settings.sft.document_mask,
    )


def _padded(run: Run, texts: list[str]) -> Tensor:
    """Return solutions as [B, completion length], padded with end-of-text."""
    width = run.settings.sampling.completion_length
    rows = [run.tokenizer.encode(text) for text in texts]
    filled = [row + [run.eos_id] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=run.ranks.device).view(-1, width)
