"""The objective with importance weights: its gradient is that of a plain torch program."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from agrpo_megatron.benchmark.reference import model as plain
from agrpo_megatron.diffusion.logprobs import policy_logits, token_logprobs
from agrpo_megatron.estimators.weights import corrected
from agrpo_megatron.scaling.flops import Work
from agrpo_megatron.training.rl import collect_rollout
from agrpo_megatron.training.update import Part, with_old_logprobs
from agrpo_megatron.types import ScoredRows
from tests.ranks import run_ranks
from tests.training.tiny import gradient, leaves, open_session, relative_error, tiny

LIMIT, KL = 1.25, 0.3
LEVELS = ("token", "row", "sequence")
CORRECTED = [
    "algorithm.name=full_trajectory",
    "algorithm.mc_samples=null",
    "algorithm.live_steps=sampled",
    f"algorithm.rollout_correction={LIMIT}",
    # To the policy before the update: without a reference, and with a gradient at a ratio of 1.
    "algorithm.kl=k1",
    "algorithm.kl_target=old",
    f"algorithm.kl_coefficient={KL}",
]


def _expected(reference, rollout, settings, vocab, level):
    """Return the loss, and the weights of its units: tokens, steps or rollouts."""
    trajectory, losses, weights = rollout.trajectory, [], []
    for row, prompt in enumerate(trajectory.prompts):
        when, gain = trajectory.unmask_step[row], float(rollout.advantages[row])
        live, logs, changes = int(trajectory.num_steps[row]), [], []
        for step in range(live):
            places = (when == step).nonzero()[:, 0]
            hidden = trajectory.tokens[row].masked_fill(when >= step, settings.model.mask_token_id)
            logits = plain.logits_of(reference, torch.cat([prompt, hidden])[None])[0]
            logits = policy_logits(logits[len(prompt) + places], vocab, temperature=1.0)
            found, _ = token_logprobs(logits, trajectory.tokens[row, places], vocab=vocab)
            logs.append(found)
            changes.append(found.detach() - trajectory.logprobs[row, places])
        if level == "sequence":
            logs, changes, share = [torch.cat(logs).sum()], [torch.cat(changes).sum()], 1.0
        elif level == "row":
            logs, changes, share = [x.sum() for x in logs], [x.sum() for x in changes], 1 / live
        else:
            share = 1 / live
        for log, change in zip(logs, changes, strict=True):
            weight = change.exp().clamp(max=LIMIT)
            losses.append(share * (weight * (KL - gain) * log).sum())
            weights.append(weight.flatten())
    return sum(losses) / len(trajectory.prompts), torch.cat(weights)


def _compare():
    """Return of each level: the weights, metrics, our gradient and that of the program."""
    session, engine = open_session(*CORRECTED)
    settings, network = session.run.settings, engine.network
    rollout, _ = collect_rollout(session, engine, 0)
    generator, found = torch.Generator().manual_seed(0), {}
    with torch.no_grad():  # the weights that are trained are not those that sampled
        for _, weight in network.named_parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    for level in LEVELS:
        tables = leaves(session, engine)
        reference = plain.Reference(settings.model, tables)
        loss, factors = _expected(reference, rollout, settings, network.vocab, level)
        loss.backward()
        algorithm = replace(settings.algorithm, level=level)
        run = replace(session.run, settings=replace(settings, algorithm=algorithm))
        metrics, ours = gradient(replace(session, run=run), engine, rollout)
        found[level] = factors, metrics, ours, {name: table.grad for name, table in tables.items()}
    return found


def test_the_gradient_is_that_of_a_plain_program():
    """What has one ratio has one weight, cut at the limit; the KL of what was drawn has it, too."""
    [found] = run_ranks(1, _compare)
    for level in LEVELS:
        factors, metrics, ours, theirs = found[level]
        assert 0 < float((factors == LIMIT).float().mean()) < 1, "some are cut, and some not"
        assert relative_error(ours, theirs) < 1e-4, level
        assert 0 < metrics["correction/truncated"] < 1


def test_weights_of_units_by_hand():
    """Two rows of two tokens: a weight of each token, of each row, and of both rows together."""
    change = torch.tensor([[0.5, -0.2], [0.1, 9.0]]).log1p()
    scored = torch.tensor([[True, True], [True, False]])
    ones, zeros = torch.ones(2, 2), torch.zeros(2, dtype=torch.int64)
    rows = ScoredRows(zeros, scored, scored, ones, is_sampled=True)
    number = torch.tensor([[0, 0], [1, 1]])
    of_rows = replace(rows, unit=number, coefficient=scored.float())
    of_all = replace(rows, unit=torch.zeros_like(number), coefficient=scored.float() / 2)
    root = 1.32**0.5
    for own, weights in (
        (rows, [1.4, 0.8, 1.1]),
        (of_rows, [1.2, 1.2, 1.1]),
        (of_all, [root] * 3),
    ):
        found, metrics = corrected(own, change, limit=1.4, kl="k3")
        assert found.weight[scored].tolist() == pytest.approx(weights)
        assert found.kl_weight is not None
        assert found.kl_weight[scored].tolist() == pytest.approx(weights)
        assert metrics["mismatch/max"] == pytest.approx(1.5)
        assert metrics["correction/truncated"] == pytest.approx((own is rows) / 3)
        exact, _ = corrected(own, change, limit=1.4, kl="exact")
        assert exact.kl_weight is not None and exact.kl_weight.eq(1).all()


def test_rows_that_the_sampler_did_not_have_are_refused():
    """An estimator of the user's own says so of its rows; a limit would have no effect there."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    owner = torch.zeros(1, dtype=torch.int64)
    scored = ScoredRows(owner, mask, mask, torch.ones(1, 2), is_sampled=False)
    part = Part(scored, [], owner, old=None, work=Work(0, 0), flops=0)
    settings = tiny("algorithm.rollout_correction=2")
    network: Any = None  # nothing passes through it
    with pytest.raises(ValueError, match=r"^algorithm\.rollout_correction=2 compares log-probs"):
        with_old_logprobs(network, part, settings, is_first=True)
