"""The SFT objective: integrated over rates and masks it is the any-order likelihood (float64)."""

import itertools
from typing import Any

import numpy
import pytest
import torch

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings, SftSettings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.logprobs import policy_logits, token_logprobs
from agrpo_megatron.diffusion.supervised import examples
from tests.diffusion.toy import Toy, relative_error

torch.set_num_threads(1)
DOUBLE = torch.float64
ROUNDED = 1e-6  # relative; weights are float32
RESPONSES = {1: [1], 2: [2, 0], 3: [0, 2, 1]}


def sft_batches(count, response, toy, **options):
    options = {"sft": SftSettings(), "seed": 0, "size": count, **options}
    return examples.sft_batches(
        [torch.tensor([0])] * count,
        examples.whole_responses(response.expand(count, -1)),
        torch.arange(count),
        torch.arange(count).split(options.pop("size")),
        mask_id=toy.mask_id,
        **options,
    )


def mean_loss(monkeypatch, table, toy, response, epsilon):
    """Integrate the package's loss over the rate and the masks.

    Given the rate t, a pattern of n masks has probability t^n (1 - t)^(C - n). Times 1 / t this is
    a polynomial, which a Gauss rule of 8 nodes integrates exactly.
    """
    nodes, weights = numpy.polynomial.legendre.leggauss(8)
    patterns = list(itertools.product([False, True], repeat=toy.length))
    cases = [(x, w, p) for x, w in zip(nodes, weights, strict=True) for p in patterns]
    uniforms = torch.tensor([(x + 1) / 2 for x, _, _ in cases], dtype=DOUBLE)
    hidden = torch.tensor([p for _, _, p in cases])
    queue = [uniforms, torch.where(hidden, 0.0, 1.0)]
    monkeypatch.setattr(noise, "uniform", lambda _key: queue.pop(0))
    (batch,) = sft_batches(len(cases), response, toy, sft=SftSettings(mask_epsilon=epsilon))
    assert not queue
    rate, masks = epsilon + (1 - epsilon) * uniforms, hidden.sum(1)
    chance = rate**masks * (1 - rate) ** (toy.length - masks)
    chance = chance * torch.tensor([w / 2 for _, w, _ in cases], dtype=DOUBLE)
    assert float(chance.sum()) == pytest.approx(1, rel=1e-12)
    logits = policy_logits(toy.score(table)(batch.rows), toy.vocab)
    logprobs, _ = token_logprobs(logits, batch.targets, vocab=toy.vocab)
    return examples.sft_loss(logprobs * chance.repeat_interleave(masks), batch)


def negative_loglik(table, toy, response, hidden, place):
    """Return -log p(token at `place`) where the places in `hidden` are masked."""
    state = response.clone()
    state[list(hidden)] = toy.mask_id
    logits = table[int(toy.state_index(state)), place, : toy.tokens]
    return -logits.log_softmax(0)[response[place]]


@pytest.mark.parametrize("length", RESPONSES)
def test_mean_sft_loss_is_the_any_order_likelihood_per_token(monkeypatch, length):
    """With rates from 0 to 1 it equals reading the tokens one by one, over all orders."""
    toy, response = Toy(length=length), torch.tensor(RESPONSES[length])
    table = toy.table(seed=5).requires_grad_()
    got = mean_loss(monkeypatch, table, toy, response, 0.0)
    orders = list(itertools.permutations(range(length)))
    expected = sum(
        negative_loglik(table, toy, response, order[j:], order[j])
        for order in orders
        for j in range(length)
    ) / (len(orders) * length)
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=ROUNDED)
    gradients = [torch.autograd.grad(value, table)[0] for value in (got, expected)]
    assert relative_error(*gradients) < ROUNDED


@pytest.mark.parametrize("length", RESPONSES)
def test_mean_sft_loss_with_a_lowest_rate_is_its_integral(monkeypatch, length):
    """Weights of the patterns are integrals of t^(n - 1) (1 - t)^(C - n) over [epsilon, 1]."""
    toy, response, epsilon = Toy(length=length), torch.tensor(RESPONSES[length]), 0.2
    table, expected = toy.table(seed=6), 0.0
    for count in range(1, length + 1):
        chance = numpy.polynomial.Polynomial([1.0])
        for _ in range(length - count):
            chance *= numpy.polynomial.Polynomial([1.0, -1.0])
        for _ in range(count - 1):
            chance *= numpy.polynomial.Polynomial([0.0, 1.0])
        whole = chance.integ()
        weight = (whole(1.0) - whole(epsilon)) / (1 - epsilon) / length
        for hidden in itertools.combinations(range(length), count):
            for place in hidden:
                expected += weight * float(negative_loglik(table, toy, response, hidden, place))
    got = mean_loss(monkeypatch, table, toy, response, epsilon)
    assert float(got) == pytest.approx(expected, rel=ROUNDED)


def test_masking_rates_are_uniform_and_weights_average_one():
    """Of 20,000 examples: rate n / C on average (1 + epsilon) / 2, weights sum to 1."""
    toy, count = Toy(length=3), 20_000
    (batch,) = sft_batches(count, torch.tensor([0, 1, 2]), toy)
    masked = len(batch.targets) / (3 * count)
    assert masked == pytest.approx(0.5005, abs=4 * 0.4 / (3 * count) ** 0.5)
    weight = float(batch.weights.double().sum()) / count
    assert weight == pytest.approx(1, abs=0.06)
    rates = 1 / (3 * batch.weights.double())
    assert float(rates.min()) > 1e-3 and float(rates.max()) < 1 + 1e-6


def test_masks_depend_on_the_example_and_not_on_the_micro_batches():
    toy = Toy(length=3)
    (whole,) = sft_batches(30, torch.tensor([0, 1, 2]), toy)
    parts = sft_batches(30, torch.tensor([0, 1, 2]), toy, size=3)
    assert len(parts) == 10 and all(int(p.rows.cu_seqlens[-1]) == 12 for p in parts)
    for name in ("targets", "weights"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name))
    tokens = torch.cat([part.rows.tokens for part in parts])
    assert torch.equal(tokens, whole.rows.tokens)
    other = sft_batches(30, torch.tensor([0, 1, 2]), toy, seed=1)[0]
    assert not torch.equal(other.rows.tokens, whole.rows.tokens)


def test_next_tokens_are_scored_in_the_example_and_masked_ones_in_its_copy():
    """Nemotron-Labs-Diffusion's loss: 1 / C per next token, 0.3 / (t C) per masked one."""
    model = ModelSettings(attention="causal_context", block_length=2)
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    responses = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 6, 5, 4, 3, 2]])

    def batch(**weights):
        (found,) = examples.sft_batches(
            prompts,
            examples.whole_responses(responses),
            torch.arange(2),
            [torch.arange(2)],
            mask_id=99,
            sft=SftSettings(**weights),
            seed=4,
            model=model,
            sampling=SamplingSettings(block_length=2, block_origin="row"),
        )
        return found

    masked, both = batch(), batch(diffusion_weight=0.3, autoregressive_weight=1.0)
    assert torch.equal(both.rows.tokens, masked.rows.tokens)
    is_masked = both.rows.tokens[both.rows.scored] == 99
    assert torch.equal(both.rows.scored[is_masked], masked.rows.scored)
    assert torch.equal(both.targets[is_masked], masked.targets)
    torch.testing.assert_close(both.weights[is_masked], 0.3 * masked.weights)
    follows = both.rows.scored[~is_masked] + 1
    assert torch.equal(both.rows.tokens[follows], responses.flatten())
    assert torch.equal(both.targets[~is_masked], responses.flatten())
    assert both.weights[~is_masked].tolist() == [pytest.approx(1 / 6)] * 12
    starts = both.rows.cu_seqlens[:-1].long()
    assert torch.equal(both.sources[~is_masked], torch.arange(2).repeat_interleave(6))
    assert (follows - starts.repeat_interleave(6)).tolist() == [*range(3, 9), *range(2, 8)]


def mixed_lengths(**options):
    """Return batches of three examples of 2, 5 and 3 response tokens, of which some are context."""
    trained = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    responses = examples.Responses(
        torch.tensor([[1, 2, 9, 9, 9], [3, 4, 5, 6, 7], [8, 1, 2, 9, 9]]),
        torch.tensor([2, 5, 3]),
        trained,
    )
    options = {"sft": SftSettings(), "mask_id": 99, "seed": 3, **options}
    prompts = [torch.tensor([10, 11, 12]), torch.tensor([13]), torch.tensor([14, 15])]
    chunks = options.pop("chunks")
    return examples.sft_batches(prompts, responses, torch.arange(3), chunks, **options), trained


BLOCKS: dict[str, Any] = {
    "model": ModelSettings(attention="causal_context", block_length=2),
    "sampling": SamplingSettings(block_length=2, block_origin="row"),
}
BOTH = {**BLOCKS, "sft": SftSettings(autoregressive_weight=1.0)}
EACH = [torch.tensor([0]), torch.tensor([1]), torch.tensor([2])]


@pytest.mark.parametrize("options", [{}, BLOCKS, BOTH], ids=["whole", "blocks", "next tokens too"])
def test_packed_rows_of_any_length_are_those_of_single_rows(options):
    """No padding inside rows, and the same states, targets and weights however they are packed."""
    (packed,), _ = mixed_lengths(chunks=[torch.arange(3)], **options)
    single, _ = mixed_lengths(chunks=EACH, **options)
    joined = torch.cat([row.rows.tokens for row in single])
    assert torch.equal(packed.rows.tokens, joined)
    lengths = packed.rows.cu_seqlens.diff().tolist()
    assert lengths == [len(row.rows.tokens) for row in single]
    if not options:
        assert lengths == [5, 6, 5]
    for name in ("targets", "weights", "sources"):
        assert torch.equal(getattr(packed, name), torch.cat([getattr(row, name) for row in single]))
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    scored = torch.cat([row.rows.scored + start for row, start in zip(single, starts, strict=True)])
    assert torch.equal(packed.rows.scored, scored)


def test_only_trained_tokens_are_masked_and_weigh_one_over_their_number():
    counts, seen = {0: 2, 1: 3, 2: 2}, set()
    for seed in range(40):
        (batch,), trained = mixed_lengths(chunks=[torch.arange(3)], seed=seed)
        masked = batch.rows.tokens == 99
        assert torch.equal(masked.nonzero()[:, 0], batch.rows.scored)
        places = batch.rows.scored - torch.tensor([3, 6, 13])[batch.sources]  # in the response
        assert trained[batch.sources, places].all()
        seen |= set(zip(batch.sources.tolist(), places.tolist(), strict=True))
        for source, weight in zip(batch.sources.tolist(), batch.weights.tolist(), strict=True):
            assert 1 / counts[source] <= weight < 1000 / counts[source]
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 3), (1, 4), (2, 1), (2, 2)}
