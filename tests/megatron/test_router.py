"""The router: which experts a token has and with which weights, against plain loops."""

import pytest
import torch

from agrpo_megatron.config.settings import MoeSettings
from agrpo_megatron.diffusion.patterns import block_causal, places_of, replay
from agrpo_megatron.megatron.layers.router import Blocks, block_ids, choose, scores_of, weigh

SOFTMAX = MoeSettings(experts=6, topk=2, ffn_hidden_size=8)
SIGMOID = MoeSettings(experts=6, topk=2, ffn_hidden_size=8, score="sigmoid", scaling_factor=2.5)


def route(logits, moe, *, bias=None, blocks=None):
    """Return weights and choice of each token."""
    scores = scores_of(logits, moe)
    chosen = choose(scores, moe, bias=bias, blocks=blocks)
    return weigh(scores, chosen, moe), chosen


def _logits(tokens=40, experts=6, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("normalise", [True, False])
def test_softmax_weights_are_probabilities_or_shares_of_them(normalise):
    logits = _logits()
    moe = MoeSettings(experts=6, topk=2, ffn_hidden_size=8, normalise=normalise)
    weights, chosen = route(logits, moe)
    for row, probabilities in enumerate(logits.softmax(-1)):
        best = sorted(range(6), key=lambda e: -probabilities[e])[:2]
        assert chosen[row].tolist() == best
        kept = probabilities[best]
        expected = kept / kept.sum() if normalise else kept
        assert torch.allclose(weights[row], expected, atol=1e-7)


def test_a_bias_chooses_and_does_not_weigh():
    logits, bias = _logits(), torch.tensor([0.0, 0.9, 0.0, -0.9, 0.0, 0.0])
    weights, chosen = route(logits, SIGMOID, bias=bias)
    _, without = route(logits, SIGMOID)
    assert (chosen != without).any()
    for row, scores in enumerate(logits.sigmoid()):
        best = sorted(range(6), key=lambda e: -(scores[e] + bias[e]))[:2]
        assert chosen[row].tolist() == best
        expected = 2.5 * scores[best] / scores[best].sum()
        assert torch.allclose(weights[row], expected, atol=1e-6)


def test_one_sigmoid_stays_as_it_is():
    moe = MoeSettings(experts=6, topk=1, ffn_hidden_size=8, score="sigmoid")
    logits = _logits()
    assert torch.equal(route(logits, moe)[0], logits.sigmoid().amax(-1, keepdim=True))


def test_groups_are_ranked_by_their_two_best_experts():
    moe = MoeSettings(
        experts=12, topk=2, ffn_hidden_size=8, score="sigmoid", groups=4, group_topk=2
    )
    logits = _logits(200, 12)
    _, chosen = route(logits, moe)
    _, free = route(logits, MoeSettings(experts=12, topk=2, ffn_hidden_size=8, score="sigmoid"))
    assert (chosen != free).any()
    for row, scores in enumerate(logits.sigmoid().tolist()):
        groups = [scores[3 * g : 3 * g + 3] for g in range(4)]
        value = [sum(sorted(group)[-2:]) for group in groups]
        kept = sorted(range(4), key=lambda g: -value[g])[:2]
        allowed = [e for e in range(12) if e // 3 in kept]
        assert chosen[row].tolist() == sorted(allowed, key=lambda e: -scores[e])[:2]


def test_given_experts_take_only_weights():
    logits = _logits()
    chosen = torch.tensor([[5, 0]]).expand(40, 2)
    weights = weigh(scores_of(logits, SOFTMAX), chosen, SOFTMAX)
    kept = logits.softmax(-1)[:, [5, 0]]
    assert torch.allclose(weights, kept / kept.sum(-1, keepdim=True), atol=1e-7)


def test_a_block_admits_the_experts_of_its_best_scores():
    """Of rows with copies: a copy's block is another block than the same one of the context."""
    rows = [block_causal(7, 4), replay(8, 4, [(4, 4)], causal=False)]
    ids, count = block_ids(places_of(rows, torch.device("cpu")))
    expected = [0] * 4 + [1] * 3 + [2] * 4 + [3] * 4 + [4] * 4
    assert count == 5 and [ids.tolist().index(i) for i in ids.tolist()] == [
        expected.index(i) for i in expected
    ]
    moe = MoeSettings(experts=6, topk=2, ffn_hidden_size=8, block_experts=3)
    logits = _logits(19)
    _, chosen = route(logits, moe, blocks=Blocks(ids, count))
    scores = logits.softmax(-1)
    for block in range(5):
        mine = [token for token in range(19) if expected[token] == block]
        best = scores[mine].amax(0).tolist()
        admitted = sorted(range(6), key=lambda e: -best[e])[:3]
        for token in mine:
            own = scores[token].tolist()
            assert chosen[token].tolist() == sorted(admitted, key=lambda e: -own[e])[:2]


def test_gradients_reach_the_logits_through_the_weights_alone():
    logits = _logits().double().requires_grad_()
    weights, _ = route(logits, SIGMOID, bias=torch.zeros(6, requires_grad=True))
    (weights * torch.tensor([1.0, -1.0])).sum().backward()
    assert logits.grad is not None and ((logits.grad != 0).sum(-1) == 2).all()
