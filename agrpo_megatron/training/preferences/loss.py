"""Pairs of given texts: masked states, their evidence lower bounds, and the loss of both.

VRPO (LLaDA 1.5, arXiv 2505.19223) is DPO with estimates of the evidence lower bound (ELBO) in place
of log-likelihoods. An estimate of a text is a mean over `sft.preferences.masks` states, each with
one mask of its own: the paper's best use of a budget. Policy and reference score the same states,
so that most of the noise of an estimate cancels in their difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.config.settings.preferences import PreferenceSettings
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.losses import preference_terms
from agrpo_megatron.estimators.masks import draw_states, last_counted
from agrpo_megatron.trajectories import given_texts
from agrpo_megatron.types import Rollout, ScoredRows


@dataclass(frozen=True)
class Pairs:
    """2 P texts as completions of their prompts: chosen 2 p and rejected 2 p + 1 of pair p."""

    rollout: Rollout
    counted: Tensor  # [2 P, C] bool, the trained tokens


def as_pairs(
    prompts: Sequence[Tensor],
    answers: Tensor,
    trained: Tensor,
    ids: Tensor,
    sampling: SamplingSettings,
) -> Pairs:
    """Return chosen and rejected text of each pair in turn as completions.

    Args:
        answers: [2 P, C] what follows the prompts.
        trained: [2 P, C] bool, the tokens whose likelihood counts; the last of them ends a text.
        ids: [2 P] noise indices: the masks of an index are the same under any layout.
        sampling: where the blocks of a block model begin.
    """
    trajectory = given_texts(prompts, answers, ids, sampling)
    is_chosen = torch.arange(len(answers), device=answers.device) % 2 == 0
    rewards = is_chosen.float()
    return Pairs(Rollout(trajectory, rewards, is_chosen, rewards), trained)


def scoring_of(settings: PreferenceSettings) -> AlgorithmSettings:
    """Return the settings by which masks are drawn, and tokens scored under the plain model."""
    return AlgorithmSettings(
        name="vrpo", states=settings.states, mc_samples=settings.masks, cut_tail=True
    )


def pair_rows(pairs: Pairs, settings: PreferenceSettings, *, seed: int) -> ScoredRows:
    """Draw the masks of each text: N = masks x 2 P rows, all texts of a mask together.

    The sum of `coefficient` times log-probs over a text's rows is the estimate of its ELBO. In a
    block model each block sees the finished text before it, so the sum is the ELBO by blocks.
    """
    context = DrawContext(scoring_of(settings), eos_id=None, seed=seed)
    states = draw_states(pairs.rollout, context, counted=pairs.counted)
    scored = states.hidden & pairs.counted[states.rollout]
    return ScoredRows(
        rollout=states.rollout,
        hidden=scored,
        scored=scored,
        weight=scored.double(),
        is_sampled=False,
        unit=states.rollout[:, None].expand_as(scored),
        coefficient=states.likelihood[:, None] * scored,
        length=last_counted(pairs.counted)[states.rollout],
    )


def row_elbos(logprobs: Tensor, rows: ScoredRows) -> Tensor:
    """Return each row's share of the ELBO of its text, [masks, P, 2], float64 nats.

    Args:
        logprobs: [N, C] of the scored tokens.
    """
    assert rows.coefficient is not None
    shares = (logprobs.double() * rows.coefficient).sum(1)
    return shares.view(-1, len(rows.rollout.unique()) // 2, 2)


def preference_loss(
    policy: Tensor, reference: Tensor, lengths: Tensor, settings: PreferenceSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss summed over pairs, and its metrics, which are means over pairs.

    -log sigmoid(margin), with margin = beta (d_chosen - d_rejected) and d the ELBO under the policy
    less that under the reference; `label_smoothing` e mixes in e of the pair with its labels
    exchanged; `chosen_weight` adds the cross-entropy of the chosen text per token. Sources: VRPO
    (arXiv 2505.19223); conservative DPO (ericmitchell.ai/cdpo.pdf); RPO (arXiv 2404.19733).

    Args:
        policy, reference: [masks, P, 2], from `row_elbos`.
        lengths: [P, 2] trained tokens of the texts.
    """
    elbo, start = policy.sum(0), reference.sum(0)
    terms = preference_terms(
        elbo - start, beta=settings.beta, label_smoothing=settings.label_smoothing
    )
    loss = terms.sum()
    if settings.chosen_weight:
        loss = loss - settings.chosen_weight * (elbo[:, 0] / lengths[:, 0]).sum()
    with torch.no_grad():
        rewards = settings.beta * (elbo - start)
        margin = rewards[:, 0] - rewards[:, 1]
        metrics = {
            "preference/accuracy": (margin > 0).double().mean(),
            "preference/margin": margin.mean(),
            "preference/chosen_reward": rewards[:, 0].mean(),
            "preference/rejected_reward": rewards[:, 1].mean(),
            "elbo/chosen": elbo[:, 0].mean(),
            "elbo/rejected": elbo[:, 1].mean(),
        }
        if len(policy) > 1:
            gaps = settings.beta * (policy - reference)
            metrics["elbo/variance"] = _variance(policy).mean()
            metrics["preference/margin_variance"] = _variance(gaps[..., 0] - gaps[..., 1]).mean()
    return loss, metrics


def _variance(shares: Tensor) -> Tensor:
    """Return the variance of a sum of shares [n, ...], estimated from their spread."""
    return len(shares) * shares.var(0)
