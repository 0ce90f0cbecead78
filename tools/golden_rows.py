"""Rows of published estimators, built from recorded masks and steps; for golden_estimators.py.

Each builder returns what an estimator of this project would score, had it drawn what was recorded.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.family import weighed
from agrpo_megatron.estimators.masks import MaskedStates, of_count, of_node, of_rate
from agrpo_megatron.estimators.steps import at_level, live_of
from agrpo_megatron.estimators.table import find_estimator
from agrpo_megatron.estimators.trajectory import masked_tail_rows, steps_as_draws
from agrpo_megatron.types import Rollout, ScoredRows


@dataclass(frozen=True)
class Recorded:
    """One case of a method as it was recorded: B completions of C tokens."""

    case: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def completions(self) -> int:
        """Return B."""
        return len(self.tensors["completion_ids"])

    @property
    def width(self) -> int:
        """Return C."""
        return self.tensors["completion_ids"].shape[1]


def _weighed(
    rollout: Rollout,
    context: DrawContext,
    recorded: Recorded,
    *,
    owner: Tensor,
    hidden: Tensor,
    likelihood: Tensor,
    draw: Tensor | None = None,
    length: Tensor | None = None,
) -> ScoredRows:
    """Weigh states [N, P + C] or [N, C] of rollouts `owner` [N] as the family of masks does."""
    prompt = hidden.shape[1] - recorded.width
    hidden_prompt = None
    if hidden[:, :prompt].any():
        is_seen = recorded.tensors["prompt_mask"].bool()
        if len(rollout.trajectory.prompts[0]) == prompt:
            is_seen = torch.ones_like(is_seen)
        pairs = zip(hidden[:, :prompt], is_seen[owner], strict=True)
        hidden_prompt = tuple(row[seen] for row, seen in pairs)
    states = MaskedStates(
        rollout=owner,
        hidden=hidden[:, prompt:],
        likelihood=likelihood,
        draw=torch.zeros_like(owner) if draw is None else draw,
        hidden_prompt=hidden_prompt,
        length=length,
    )
    return weighed(states, rollout, context)


def _numbers(recorded: Recorded) -> Tensor:
    return torch.arange(recorded.completions, device=recorded.tensors["completion_ids"].device)


def one_shot(recorded: Recorded, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Read one mask of each completion, [B, P + C]."""
    owner = _numbers(recorded)
    weight = of_rate(torch.ones_like(owner), 1)
    hidden = recorded.tensors["masked"]
    return _weighed(rollout, context, recorded, owner=owner, hidden=hidden, likelihood=weight)


def coupled_and_full(recorded: Recorded, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Read a mask and its complement, [B, C] each, and add the fully masked state."""
    first, second = recorded.tensors["mask1"], recorded.tensors["mask2"]
    rate, ones = recorded.tensors["mask_ratio"], torch.ones_like(recorded.tensors["rewards"])
    return _weighed(
        rollout,
        context,
        recorded,
        owner=_numbers(recorded).repeat(3),
        hidden=torch.cat([torch.ones_like(first), first, second]),
        likelihood=of_rate(torch.cat([ones, rate * ones, (1 - rate) * ones]), 2),
    )


def bounds(recorded: Recorded, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Read masks [M, B, P + C] of a lower and an upper bound."""
    hidden, numbers = recorded.tensors["masked"], _numbers(recorded)
    owner = numbers.repeat(len(hidden))
    return _weighed(
        rollout,
        context,
        recorded,
        owner=owner,
        hidden=hidden.flatten(0, 1),
        likelihood=of_rate(torch.ones_like(owner), len(hidden)),
        draw=torch.arange(len(hidden), device=owner.device).repeat_interleave(len(numbers)),
    )


def elbo(recorded: Recorded, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Read masks [rounds, B * rows of a round, C], a rollout's rows of a round adjacent."""
    masked, numbers = recorded.tensors["masked"], _numbers(recorded)
    each, rounds = masked.shape[1] // len(numbers), len(masked)
    owner, states = numbers.repeat_interleave(each).repeat(rounds), context.algorithm.filled.states
    hidden = masked.flatten(0, 1)
    count = hidden.sum(1)
    weight = of_count(count, recorded.width, each * rounds)
    if states == "quadrature":
        nodes = [of_node(number, rounds)[1] for number in range(rounds)]
        weight = torch.tensor(nodes, dtype=torch.float64, device=owner.device)
        weight = weight.repeat_interleave(len(numbers))
    elif states == "coupled_counts":
        both = torch.cat([count, recorded.width - count])
        weight = of_count(both, recorded.width + 1, 2 * rounds)
        owner, hidden = owner.repeat(2), torch.cat([hidden, ~hidden])
    return _weighed(rollout, context, recorded, owner=owner, hidden=hidden, likelihood=weight)


def counts(recorded: Recorded, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Read masks [B, K, P + C]; tokens without attention are not in the states."""
    masked = recorded.tensors["masked"]
    owner, hidden = _numbers(recorded).repeat_interleave(masked.shape[1]), masked.flatten(0, 1)
    attended = recorded.tensors.get("completion_attention")
    length = None if attended is None else attended.sum(1)[owner]
    live = torch.full_like(owner, recorded.width) if length is None else length
    weight = of_count(hidden.sum(1), live, masked.shape[1])
    return _weighed(
        rollout, context, recorded, owner=owner, hidden=hidden, likelihood=weight, length=length
    )


def listed(recorded: Recorded, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Read rows [N, P + C]; ratios of tokens need no rates, and none were recorded."""
    owner, hidden = recorded.tensors["row_sample"], recorded.tensors["masked"]
    weight = torch.full(owner.shape, torch.nan, dtype=torch.float64, device=owner.device)
    return _weighed(rollout, context, recorded, owner=owner, hidden=hidden, likelihood=weight)


def of_trajectory(recorded: Recorded, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Let the estimator choose rows by the recorded steps; prompts are masked as recorded."""
    rows = find_estimator(context.algorithm)(rollout, context)
    hidden = recorded.tensors.get("prompt_masked")
    return rows if hidden is None else replace(rows, hidden_prompt=tuple(hidden[rows.rollout]))


def of_steps(recorded: Recorded, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Read chosen steps and their advantages, [B, K] each."""
    live, _ = live_of(rollout.trajectory, context)
    steps = recorded.tensors["eval_steps"]
    draws = steps_as_draws(steps, steps < live[:, None])
    rows = at_level(draws, rollout, context)
    return replace(rows, advantage=recorded.tensors["advantages"].flatten())


def of_masked_tails(recorded: Recorded, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Read chosen steps [K, B]; all masked tokens of their states are scored."""
    steps = recorded.tensors["steps"].T
    return masked_tail_rows(steps, torch.ones_like(steps, dtype=torch.bool), rollout, context)


def by_token(rows: ScoredRows, values: Tensor) -> Tensor:
    """Return recorded values [B, C] of tokens by scored token, [N, C]."""
    return values[rows.rollout]


def by_rollout(rows: ScoredRows, values: Tensor) -> Tensor:
    """Return recorded values [B] of completions by scored token, [N, C]."""
    return values[rows.rollout, None].expand(rows.scored.shape)


def per_token(rows: ScoredRows, values: Tensor) -> Tensor:
    """Return recorded log-likelihoods [B] of completions over their length, [N, C]."""
    return by_rollout(rows, values) / rows.scored.shape[1]


def by_draw(rows: ScoredRows, values: Tensor) -> Tensor:
    """Return recorded values [M, B, C] of tokens under each mask, [N, C]."""
    assert rows.unit is not None
    return values[rows.unit[:, 0], rows.rollout]


def in_order(rows: ScoredRows, values: Tensor) -> Tensor:
    """Return recorded values [..., C] of tokens, one row for each scored row, [N, C]."""
    return values.reshape(rows.scored.shape)


def by_mask(rows: ScoredRows, values: Tensor) -> Tensor:
    """Return recorded values [B, K] of states, in the order of the rows, [N, C]."""
    return values.reshape(-1, 1).expand(rows.scored.shape)


def by_step(rows: ScoredRows, values: Tensor) -> Tensor:
    """Return recorded values [K, B] of steps, in the order of the rows, [N, C]."""
    return by_mask(rows, values.T)
