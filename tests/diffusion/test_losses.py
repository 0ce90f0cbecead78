"""The policy loss against a literal loop, and gradients against finite differences."""

import math

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.diffusion.logprobs import Vocabulary, policy_logits, token_logprobs
from agrpo_megatron.estimators.losses import of_tokens, policy
from agrpo_megatron.types import PackedRows, TimestepBatch

torch.set_num_threads(1)
DOUBLE = torch.float64
NO_ROWS = PackedRows(torch.zeros(0), torch.zeros(1), torch.zeros(0))


def batch_of(count=40, *, reference=False, zero_weights=0):
    """Return a batch and log-probs whose ratios lie on both sides of both clips."""
    generator = torch.Generator().manual_seed(0)

    def random():
        return torch.randn(count, generator=generator, dtype=DOUBLE)

    logprobs = -1 - random().abs()
    weights = random().abs()
    weights[:zero_weights] = 0
    batch = TimestepBatch(
        rows=NO_ROWS,
        targets=torch.zeros(count, dtype=torch.int64),
        old_logprobs=logprobs + 0.4 * random(),
        reference_logprobs=logprobs + random() if reference else None,
        support_ids=None,
        advantages=random(),
        weights=weights,
        **_places(count, weights),
    )
    return logprobs, batch


def _places(count, weights):
    """Return the fields of a batch that say where its tokens come from."""
    zeros = torch.zeros(count, dtype=torch.int64)
    places = {"sources": zeros, "row": zeros, "position": torch.arange(count)}
    return {**places, "kl_weights": weights}


def _loss(logprobs, batch, algorithm):
    outputs = policy(of_tokens(logprobs, batch), algorithm)
    return outputs.loss, outputs.metrics


def literal_loss(logprobs, batch, *, low, high, beta):
    total, clipped_tokens, kl_sum = 0.0, 0, 0.0
    for j in range(len(logprobs)):
        ratio = math.exp(logprobs[j] - batch.old_logprobs[j])
        advantage, weight = float(batch.advantages[j]), float(batch.weights[j])
        clipped = min(max(ratio, 1 - low), 1 + high)
        term = -min(ratio * advantage, clipped * advantage)
        if clipped * advantage < ratio * advantage and weight != 0:
            clipped_tokens += 1
        if beta > 0:
            gap = float(batch.reference_logprobs[j] - logprobs[j])
            kl = (math.exp(gap) - gap - 1) * ratio
            term += beta * kl
            kl_sum += kl * (weight != 0)
        total += term * weight
    return total, clipped_tokens, kl_sum


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_policy_loss_equals_a_literal_loop(low, high, beta):
    logprobs, batch = batch_of(reference=beta > 0, zero_weights=5)
    algorithm = AlgorithmSettings(clip_low=low, clip_high=high, kl_coefficient=beta)
    loss, metrics = _loss(logprobs, batch, algorithm)
    expected, clipped, kl = literal_loss(logprobs, batch, low=low, high=high, beta=beta)
    assert float(loss) == pytest.approx(expected, rel=1e-13)
    assert int(metrics["clipped_tokens"]) == clipped > 0
    assert int(metrics["scored_tokens"]) == 35
    assert float(metrics["kl_sum"]) == pytest.approx(kl, rel=1e-12)
    ratio = (logprobs - batch.old_logprobs).exp()[5:]
    assert float(metrics["ratio_sum"]) == pytest.approx(float(ratio.sum()), rel=1e-13)
    error = float((ratio - 1).abs().max())
    assert float(metrics["ratio_max_error"]) == pytest.approx(error, rel=1e-13)
    errors = metrics["ratio_p99_error"]
    assert torch.equal(errors[:5], torch.full_like(errors[:5], -1))  # tokens without weight
    assert torch.allclose(errors[5:], (ratio - 1).abs(), rtol=1e-12, atol=0)


def test_clip_stops_the_gradient_only_where_the_ratio_has_gone_too_far():
    logprobs, batch = batch_of()
    logprobs.requires_grad_()
    loss, _ = _loss(logprobs, batch, AlgorithmSettings())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    ratio = (logprobs - batch.old_logprobs).exp().detach()
    gain = batch.advantages
    stopped = ((ratio > 1.2) & (gain > 0)) | ((ratio < 0.8) & (gain < 0))
    expected = torch.where(stopped, 0.0, -ratio * gain * batch.weights)
    assert 5 < int(stopped.sum()) < 35
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=0)


def test_gradient_at_ratio_one_is_reinforce():
    """Both arguments of the minimum tie there; their halves add up to the whole."""
    logprobs, batch = batch_of()
    logprobs = batch.old_logprobs.clone().requires_grad_()
    loss, _ = _loss(logprobs, batch, AlgorithmSettings())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(gradient, -batch.advantages * batch.weights, rtol=1e-14)


def test_kl_term_is_the_gradient_of_the_reverse_kl():
    """On policy, ratio times k3 has the gradient of KL(policy || reference) in expectation.

    The ratio lets the gradient through; its value is 1 at the first update.
    """
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 5, generator=generator, dtype=DOUBLE)
    logits.requires_grad_()
    logprobs, reference = logits.log_softmax(0), reference.log_softmax(0)
    probs = logprobs.detach().exp()
    batch = TimestepBatch(
        rows=NO_ROWS,
        targets=torch.arange(5),
        old_logprobs=logprobs.detach(),
        reference_logprobs=reference,
        support_ids=None,
        advantages=torch.zeros(5, dtype=DOUBLE),
        weights=probs,
        **_places(5, probs),
    )
    loss, _ = _loss(logprobs, batch, AlgorithmSettings(kl_coefficient=1.0))
    (got,) = torch.autograd.grad(loss, logits)
    again = logits.log_softmax(0)
    kl = (again.exp() * (again - reference)).sum()
    (expected,) = torch.autograd.grad(kl, logits)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-15)
    assert float(loss.detach()) == pytest.approx(float(kl.detach()), rel=1e-12)


def test_an_empty_batch_has_zero_loss_and_a_connected_graph():
    _, batch = batch_of(0)
    weights = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    loss, metrics = _loss(weights[:0], batch, AlgorithmSettings())
    (gradient,) = torch.autograd.grad(loss, weights)
    assert float(loss.detach()) == 0 and gradient.tolist() == [0.0, 0.0, 0.0]
    assert all(float(value.detach().sum()) == 0 for value in metrics.values())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("truncated", [False, True])
def test_gradient_of_logprobs_equals_finite_differences(temperature, truncated):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 9, generator=generator, dtype=DOUBLE, requires_grad=True)
    vocab = Vocabulary(8, forbidden=(2,))
    targets = torch.tensor([0, 1, 3, 7, 4, 0])
    support = torch.tensor([[0, 5, -1], [1, -1, -1], [4, 3, 1], [7, 0, -1], [4, 5, 6], [0, 1, 7]])

    def scored(raw):
        policy = policy_logits(raw, vocab, temperature=temperature)
        ids = support if truncated else None
        return token_logprobs(policy, targets, vocab=vocab, support_ids=ids)  # and entropies

    assert torch.autograd.gradcheck(scored, (logits,), eps=1e-6, atol=1e-8, rtol=1e-6)
