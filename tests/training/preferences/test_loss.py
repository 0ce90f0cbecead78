"""Preference pairs: the loss in numbers, what is masked, and the evidence lower bound by blocks."""

import itertools
from math import exp, log

import pytest
import torch

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.config.settings.preferences import PreferenceSettings
from agrpo_megatron.training.preferences.loss import (
    as_pairs,
    pair_rows,
    preference_loss,
    row_elbos,
)

torch.set_num_threads(1)


def _pairs(*texts):
    """Return texts of (prompt tokens, trained marks) as pairs."""
    width = max(len(marks) for _, marks in texts)
    trained = torch.tensor([[*marks, *[0] * (width - len(marks))] for _, marks in texts]).bool()
    answers = torch.arange(1, width + 1).expand(len(texts), -1)
    prompts = [torch.arange(prompt) for prompt, _ in texts]
    return as_pairs(prompts, answers, trained, torch.arange(len(texts)), SamplingSettings())


def _loss(**changed):
    """Return loss and metrics of two pairs of two masks, whose numbers are written out here."""
    policy = torch.tensor([[[-4.0, -5.0], [-3.0, -2.0]], [[-2.0, -3.0], [-1.0, -2.0]]])
    reference = torch.tensor([[[-5.0, -4.0], [-3.0, -3.0]], [[-3.0, -3.0], [-2.0, -2.0]]])
    lengths = torch.tensor([[4, 6], [2, 2]])
    settings = PreferenceSettings(beta=0.5, **changed)
    return preference_loss(policy.double(), reference.double(), lengths, settings)


def test_the_loss_is_dpo_on_sums_over_masks():
    """Pair 0: gains 2 and -1, margin 0.5 x 3; pair 1: gains 1 and 1, margin 0, not above 0."""
    loss, metrics = _loss()
    assert float(loss) == pytest.approx(log(1 + exp(-1.5)) + log(2), rel=1e-12)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            "preference/accuracy": 0.5,
            "preference/margin": 0.75,
            "preference/chosen_reward": 0.75,
            "preference/rejected_reward": 0.0,
            "elbo/chosen": -5.0,
            "elbo/rejected": -6.0,
            # Of two shares the variance of their sum is the square of their difference.
            "elbo/variance": (4 + 4 + 4 + 0) / 4,
            # Margins of single masks: 1 and 0.5; -0.5 and 0.5.
            "preference/margin_variance": (0.25 + 1.0) / 2,
        }
    )


def test_smoothing_exchanges_labels_and_the_chosen_text_weighs_per_token():
    loss, _ = _loss(label_smoothing=0.25)
    expected = 0.75 * log(1 + exp(-1.5)) + 0.25 * log(1 + exp(1.5)) + log(2)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    plain, _ = _loss()
    loss, _ = _loss(chosen_weight=0.1)
    assert float(loss - plain) == pytest.approx(0.1 * (6 / 4 + 4 / 2), rel=1e-12)


def test_one_mask_has_no_variance():
    one = torch.zeros(1, 1, 2)
    _, metrics = preference_loss(one, one, torch.ones(1, 2), PreferenceSettings())
    assert not [name for name in metrics if "variance" in name]


def test_only_trained_tokens_are_hidden_and_rows_end_with_the_text():
    pairs = _pairs((3, [1, 1, 0, 0, 1, 1]), (3, [1, 1]), (1, [1]), (1, [1] * 4))
    rows = pair_rows(pairs, PreferenceSettings(masks=4), seed=0)
    assert len(rows.rollout) == 16 and bool((rows.hidden == rows.scored).all())
    assert rows.length is not None and rows.length.tolist() == [6, 2, 1, 4] * 4
    assert not bool((rows.hidden & ~pairs.counted[rows.rollout]).any())
    # `counts` spreads the hidden tokens from one to all: of four masks over four tokens, each once.
    counts = rows.hidden.sum(1).view(4, 4)
    for text in (0, 3):
        assert counts[:, text].sort().values.tolist() == [1, 2, 3, 4]
    assert counts[:, 2].tolist() == [1] * 4


@pytest.mark.parametrize("states", ["counts", "random_count"])
@pytest.mark.parametrize("size", [4, 2], ids=["full", "blocks"])
def test_the_estimate_is_the_mean_over_all_orders_of_reading(size, states):
    """Also by blocks: masks of whole texts have the likelihoods of orders within each block.

    The log-prob of a token is a table by its place and the visible trained tokens that it sees:
    those of all places, or those of its own block of two (the blocks before it are finished).

    Args:
        size: places of a block.
    """
    length, copies = 4, 4000
    table = torch.randn(length, 2**length, generator=torch.Generator().manual_seed(0)).double()
    block = torch.arange(length) // size

    def logprob(place, visible):
        seen = [p for p in range(length) if p in visible and block[p] == block[place]]
        return table[place, sum(2**p for p in seen)]

    orders = list(itertools.permutations(range(length)))
    exact = sum(logprob(o[n], o[:n]) for o in orders for n in range(length)) / len(orders)
    pairs = _pairs(*[(4, [1] * length)] * (2 * copies))
    rows = pair_rows(pairs, PreferenceSettings(masks=2, states=states), seed=3)
    seen = ~rows.hidden
    places = [
        table[place].gather(
            0, ((seen & (block == block[place])) * 2 ** torch.arange(length)).sum(1)
        )
        for place in range(length)
    ]
    elbos = row_elbos(torch.stack(places, 1), rows).sum(0).flatten()
    error = 4 * float(elbos.std()) / len(elbos) ** 0.5
    assert float(elbos.mean()) == pytest.approx(float(exact), abs=error)
    assert abs(float(exact - table[:, 0].sum())) > 5 * error  # what one fully masked state gives
