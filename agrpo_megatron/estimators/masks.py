"""States whose hidden positions are a mask of the finished completion, drawn by counted noise.

Each sampler draws `mc_samples` masks of every rollout. With them comes the weight of a row in the
estimate of the completion's log-likelihood: the sum over a rollout's rows of `likelihood` times the
log-probs of hidden tokens is an estimate of the evidence lower bound.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.weights import counted_tokens
from agrpo_megatron.types import Rollout

RATES, PLACES, PROMPTS, EARLIER = range(4)  # uses of one draw's noise


@dataclass(frozen=True)
class MaskedStates:
    """N states of finished completions; rows of one draw are neighbours."""

    rollout: Tensor  # [N] int64
    hidden: Tensor  # [N, C] bool
    likelihood: Tensor  # [N] float64
    draw: Tensor  # [N] int64, the number of the mask
    hidden_prompt: tuple[Tensor, ...] | None = None  # N tensors [prompt length] bool
    length: Tensor | None = None  # [N] completion tokens in the state; None: all


@dataclass(frozen=True)
class _Draw:
    """One mask of every rollout: [R] tensors, and the noise of its uses."""

    number: int
    draws: int
    counted: Tensor  # [R, C] bool: tokens that may be scored
    ids: Tensor  # [R] rollout ids
    seed: int
    block: int
    prompt_mask: float

    def uniform(self, use: int, *places: Tensor) -> Tensor:
        """Return counted numbers in (0, 1) for each rollout, [R, ...]."""
        use_of_draw = torch.tensor(4 * self.number + use, device=self.ids.device)
        ids = self.ids.view(-1, *[1] * len(places))
        return noise.uniform(noise.noise_key(self.seed, noise.STATES, ids, use_of_draw, *places))

    @property
    def chances(self) -> Tensor:
        """Return a number for each position, [R, C]."""
        return self.uniform(PLACES, torch.arange(self.counted.shape[1], device=self.ids.device))

    @property
    def strata(self) -> Tensor:
        """Return a number [R] in this draw's part of the unit interval: one offset per rollout."""
        first = torch.zeros((), dtype=torch.int64, device=self.ids.device)
        offset = noise.uniform(noise.noise_key(self.seed, noise.STATES, self.ids, -1 - first))
        return (self.number + offset) / self.draws

    def lowest(self, counts: Tensor, allowed: Tensor) -> Tensor:
        """Mark `counts` [R] random positions among the allowed ones [R, C]."""
        order = self.chances.masked_fill(~allowed, 2.0).argsort(1).argsort(1)
        return (order < counts[:, None]) & allowed


type _Rows = list[tuple[Tensor, Tensor]]  # hidden [R, C] and likelihood [R], for each row of a draw


def draw_states(
    rollout: Rollout, context: DrawContext, *, counted: Tensor | None = None
) -> MaskedStates:
    """Draw `algorithm.mc_samples` masks of every rollout by `algorithm.states`.

    Args:
        counted: [R, C] bool, the tokens that may be scored; None: those of `algorithm.tail`.
    """
    settings, trajectory = context.algorithm.filled, rollout.trajectory
    counted = counted_tokens(trajectory, context) if counted is None else counted
    hidden, likelihood, numbers = [], [], []
    draws = settings.draws
    for number in range(draws):
        draw = _Draw(
            number,
            draws,
            counted,
            trajectory.rollout_ids,
            context.seed,
            trajectory.sampling.block_length,
            settings.prompt_mask or 0.0,
        )
        low, high = settings.mask_low or 0.0, settings.mask_high or 1.0
        for masked, weight in STATES[str(settings.states)](draw, low, high):
            hidden.append(masked)
            likelihood.append(weight)
            numbers.append(torch.full_like(trajectory.rollout_ids, number))
    rows = torch.arange(len(counted), device=counted.device).repeat(len(hidden))
    draw_of = torch.cat(numbers)
    return MaskedStates(
        rollout=rows,
        hidden=torch.cat(hidden),
        likelihood=torch.cat(likelihood),
        draw=draw_of,
        hidden_prompt=hidden_prompts(rollout, rows, draw_of, context),
        length=last_counted(counted)[rows] if settings.cut_tail else None,
    )


def hidden_prompts(
    rollout: Rollout, rows: Tensor, draw: Tensor, context: DrawContext
) -> tuple[Tensor, ...] | None:
    """Hide each prompt token of each row with probability `algorithm.prompt_mask`.

    Args:
        rows: [N] the rollout of each row.
        draw: [N] the number of its mask: rows of one rollout and number hide the same tokens.
    """
    rate, trajectory = context.algorithm.filled.prompt_mask, rollout.trajectory
    if not rate:
        return None
    result = []
    for row, number in zip(rows.tolist(), draw.tolist(), strict=True):
        places = torch.arange(len(trajectory.prompts[row]), device=rows.device)
        use = torch.tensor(4 * number + PROMPTS, device=rows.device)
        key = noise.noise_key(context.seed, noise.STATES, trajectory.rollout_ids[row], use, places)
        result.append(noise.uniform(key) < rate)
    return tuple(result)


def of_rate(rate: Tensor, draws: int) -> Tensor:
    """Return the likelihood of rows whose tokens are hidden with probability `rate` [...]."""
    return 1 / (rate.double() * draws)


def of_count(count: Tensor, live: Tensor | int, draws: int) -> Tensor:
    """Return the likelihood of rows [...] that hide `count` of `live` tokens."""
    return live / (count.double().clamp(min=1) * draws)


def of_node(number: int, draws: int) -> tuple[float, float]:
    """Return the share of hidden tokens and the likelihood at a node of Gauss and Legendre's rule.

    Args:
        number: of the node, from 0.
        draws: how many nodes the rule has.
    """
    nodes, weights = leggauss(draws)
    share = (1 + float(nodes[number])) / 2
    return share, float(weights[number]) / (2 * share)


def last_counted(counted: Tensor) -> Tensor:
    """Return the completion tokens [R] up to the last counted one of [R, C]."""
    places = 1 + torch.arange(counted.shape[1], device=counted.device)
    return (places * counted).amax(1)


def _full(draw: _Draw, _low: float, _high: float) -> _Rows:
    """Hide the whole completion (diffu-GRPO, arXiv 2504.12216)."""
    return [(torch.ones_like(draw.counted), of_rate(torch.ones_like(draw.ids), draw.draws))]


def _random(draw: _Draw, low: float, high: float) -> _Rows:
    """Hide each token at a rate drawn per mask; uncounted tokens are hidden (UniGRPO)."""
    rate = low + (high - low) * draw.uniform(RATES)
    hidden = (draw.chances < rate[:, None]) | ~draw.counted
    return [(hidden, of_rate(rate, draw.draws))]


def _random_count(draw: _Draw, _low: float, _high: float) -> _Rows:
    """Hide a random number of counted tokens, from one to all; uncounted tokens are hidden."""
    live = draw.counted.sum(1)
    count = 1 + (draw.uniform(RATES) * live).long()
    return [(draw.lowest(count, draw.counted) | ~draw.counted, of_count(count, live, draw.draws))]


def _coupled(draw: _Draw, low: float, high: float) -> _Rows:
    """Hide a random mask, then its complement; uncounted tokens are hidden in both."""
    rate = low + (high - low) * draw.uniform(RATES)
    hidden = draw.chances < rate[:, None]
    rows = [(hidden, rate), (~hidden, 1 - rate)]
    return [(mask | ~draw.counted, of_rate(share, 2 * draw.draws)) for mask, share in rows]


def _coupled_and_full(draw: _Draw, low: float, high: float) -> _Rows:
    """Hide everything, a random mask, and its complement: coupled-GRPO's code."""
    rate = low + (high - low) * draw.uniform(RATES)
    hidden = draw.chances < rate[:, None]
    rows = [(torch.ones_like(hidden), torch.ones_like(rate)), (hidden, rate), (~hidden, 1 - rate)]
    return [(mask, of_rate(share, 2 * draw.draws)) for mask, share in rows]


def _counts(draw: _Draw, _low: float, _high: float) -> _Rows:
    """Hide an exact number of counted tokens, spread evenly from one to all over the masks."""
    live = draw.counted.sum(1)
    count = (1 + (draw.strata * live).long()).clamp(max=live)
    return [(draw.lowest(count, draw.counted), of_count(count, live, draw.draws))]


def _coupled_counts(draw: _Draw, _low: float, _high: float) -> _Rows:
    """Hide an exact number of tokens, spread evenly from none to all, and the complement."""
    width = draw.counted.shape[1]
    count = (draw.strata * (width + 1)).long().clamp(max=width)
    hidden = draw.lowest(count, torch.ones_like(draw.counted))
    rows = [(hidden, count), (~hidden, width - count)]
    return [(mask, of_count(size, width + 1, 2 * draw.draws)) for mask, size in rows]


def _quadrature(draw: _Draw, _low: float, _high: float) -> _Rows:
    """Hide the share of tokens at this node of a Gauss-Legendre rule (GDPO, arXiv 2510.08554)."""
    share, weight = of_node(draw.number, draw.draws)
    count = torch.full_like(draw.ids, max(1, int(share * draw.counted.shape[1])))
    hidden = draw.lowest(count, torch.ones_like(draw.counted))
    return [(hidden, torch.full(draw.ids.shape, weight, device=draw.ids.device))]


def _blocks(draw: _Draw, _low: float, _high: float) -> _Rows:
    """Hide a random number of one block's counted tokens and all later tokens.

    Earlier completion tokens are hidden with probability `prompt_mask`, as the prompt is, and then
    scored. Blocks of a rollout's masks differ while it has enough. Source: SPG (arXiv 2510.09541).
    """
    places, ids = torch.arange(draw.counted.shape[1], device=draw.ids.device), draw.ids
    blocks = places // draw.block
    touched = (-(-draw.counted.sum(1) // draw.block)).clamp(min=1)[:, None]
    every = torch.arange(int(blocks[-1]) + 1, device=ids.device)
    chance = noise.uniform(noise.noise_key(draw.seed, noise.STATES, ids[:, None], -2 - every))
    order = chance.masked_fill(every >= touched, 2.0).argsort(1)
    mine = order.gather(1, draw.number % touched)
    inside = (blocks == mine) & draw.counted
    count = 1 + (draw.uniform(RATES) * inside.sum(1)).long()
    earlier = (blocks < mine) & (draw.uniform(EARLIER, places) < draw.prompt_mask)
    hidden = draw.lowest(count, inside) | (blocks > mine) | earlier | ~draw.counted
    return [(hidden, of_rate(torch.ones_like(ids), draw.draws))]


STATES: dict[str, Callable[[_Draw, float, float], _Rows]] = {
    "full": _full,
    "random": _random,
    "random_count": _random_count,
    "blocks": _blocks,
    "coupled": _coupled,
    "coupled_and_full": _coupled_and_full,
    "counts": _counts,
    "coupled_counts": _coupled_counts,
    "quadrature": _quadrature,
}
