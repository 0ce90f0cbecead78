"""One family of estimators on masks of the finished completion: states x weights x level.

None of them is unbiased for the policy gradient of the sampler: their states are not those that
the sampler visited. docs/estimators.md has the bias of each on a case that can be listed.

| entry | states | level | paper, public code |
|---|---|---|---|
| `diffu_grpo` | all hidden, prompt masked | token | arXiv 2504.12216, dllm-reasoning/d1 |
| `wd1` | all hidden, prompt masked | log-likelihood | arXiv 2507.08838, xiaohangt/wd1 |
| `unigrpo` | random rates | token | arXiv 2505.15809, Gen-Verse/dLLM-RL |
| `coupled_grpo` | a mask and its complement | token | arXiv 2506.20639, apple/ml-diffucoder |
| `spg` | blocks | bounds | arXiv 2510.09541, facebookresearch/SPG |
| `gdpo` | quadrature nodes | rollout | arXiv 2510.08554 |
| `espo` | coupled counts | rollout | arXiv 2512.03759 |
| `vrpo` | counts | pair | arXiv 2505.19223, yjyddq/DARE |
| `bgpo` | counts | row | yjyddq/DARE |

Forward passes per completion and update are the masks times the rows of each, see `masks`; as many
without gradient for the old policy where there are several updates or units, and for a reference.
"""

from dataclasses import replace

import torch
from torch import Tensor

from agrpo_megatron.estimators.advantages import pairs
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.masks import MaskedStates, draw_states
from agrpo_megatron.estimators.weights import (
    by_rollout,
    by_row,
    counted_tokens,
    kl_weights,
    select_rows,
    token_weights,
)
from agrpo_megatron.types import Rollout, ScoredRows


def family(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Draw masks by `algorithm.states`, and weigh their tokens."""
    return weighed(draw_states(rollout, context), rollout, context)


def weighed(states: MaskedStates, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Return the rows of masked states that hide a counted token, with weights and units."""
    settings = context.algorithm.filled
    counted = counted_tokens(rollout.trajectory, context)
    scored = states.hidden & counted[states.rollout]
    kept = scored.any(1).nonzero()[:, 0]
    owner, scored, likelihood = states.rollout[kept], scored[kept], states.likelihood[kept]
    hidden_prompt = states.hidden_prompt
    if hidden_prompt is not None:
        hidden_prompt = tuple(hidden_prompt[row] for row in kept.tolist())
    weight = token_weights(scored, owner, rollout, context, step=states.draw[kept])
    rows = ScoredRows(
        rollout=owner,
        hidden=states.hidden[kept],
        scored=scored,
        weight=weight,
        is_sampled=False,
        hidden_prompt=hidden_prompt,
        length=None if states.length is None else states.length[kept],
    )
    if settings.loss == "preference":
        return _paired(by_rollout(rows, likelihood, rollout, context), rollout, context)
    if settings.loss == "sandwich":
        return _bounded(rows, counted, states.draw[kept])
    if settings.states == "coupled_and_full" and settings.level == "token":
        return _together(rows, likelihood, counted)
    if settings.level == "row":
        draws = torch.bincount(owner, minlength=len(counted))[owner]
        return by_row(rows, likelihood * draws, context)
    if settings.level == "sequence":
        return by_rollout(rows, likelihood, rollout, context)
    return replace(rows, kl_weight=kl_weights(rows, context))


def _together(rows: ScoredRows, likelihood: Tensor, counted: Tensor) -> ScoredRows:
    """Give each token one ratio over all rows that score it; each counts once in the mean."""
    width = rows.scored.shape[1]
    place = rows.rollout[:, None] * width + torch.arange(width, device=counted.device)
    each = len(counted) / max(1, int(counted.sum()))
    return replace(
        rows,
        weight=rows.scored * each,
        unit=place,
        coefficient=likelihood[:, None] * rows.scored,
    )


def _bounded(rows: ScoredRows, counted: Tensor, draw: Tensor) -> ScoredRows:
    """Weigh rollouts by their counted tokens; coefficients are 1 / t, t the hidden share."""
    length = counted.sum(1).double()
    weight = len(counted) * length / length.sum().clamp(min=1)
    share = rows.scored.sum(1) / length[rows.rollout]
    return replace(
        rows,
        weight=weight[rows.rollout, None] * rows.scored,
        unit=draw[:, None].expand_as(rows.scored),
        coefficient=rows.scored / share[:, None],
    )


def _paired(rows: ScoredRows, rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Keep the best and the worst completion of each group: units 2 p and 2 p + 1 of pair p."""
    best, worst = pairs(rollout.rewards, context.algorithm.group_size)
    unit = torch.full_like(rollout.trajectory.rollout_ids, -1)
    numbers = torch.arange(len(best), device=unit.device)
    unit[best], unit[worst] = 2 * numbers, 2 * numbers + 1
    rows = select_rows(rows, (unit[rows.rollout] >= 0).nonzero()[:, 0])
    weight = len(rollout.advantages) / max(1, len(best))
    return replace(
        rows,
        weight=rows.scored * weight,
        unit=unit[rows.rollout, None].expand_as(rows.scored),
        advantage=1.0 - 2.0 * (unit[rows.rollout] % 2),
    )
