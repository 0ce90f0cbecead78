"""Likelihoods: the bound by its definition, unbiased draws, and no dependence on the batch."""

import itertools

import pytest
import torch

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.packing import pack
from agrpo_megatron.evaluation.target import find_target
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.serving.likelihood import Scoring, listed, masked_states
from agrpo_megatron.serving.model import lead, open_model, resolved_model
from agrpo_megatron.types import Rollout, Trajectory
from tests.cli.test_evaluate import HF, ON_HF
from tests.ranks import run_ranks

SETTINGS = [setting for setting in ON_HF if not setting.startswith("task")]
CONTEXT, TEXT = [9, 12, 14], [20, 21, 22]
VOCABULARY = 160  # the mask token is the last one, and greedy decoding never writes it


def rollout(count, length):
    """Return texts whose noise is of `count` different contexts."""
    tokens = torch.zeros(count, length, dtype=torch.int64)
    zeros, ids = torch.zeros(count, length), torch.arange(count)
    trajectory = Trajectory(
        (torch.zeros(1, dtype=torch.int64),) * count,
        tokens,
        tokens,
        zeros,
        zeros,
        zeros,
        None,
        ids,
        ids,
        SamplingSettings(completion_length=length, block_length=length),
    )
    return Rollout(trajectory, zeros[:, 0], zeros[:, 0].bool(), zeros[:, 0])


def estimates(count, job, table):
    """Return the estimates [count] for a table of log-probs by mask and position."""
    length = table.shape[1]
    states = masked_states(rollout(count, length), job, seed=0)
    number = (states.hidden.long() << torch.arange(length)).sum(1)
    each = states.likelihood.double() * (table[number] * states.hidden).sum(1)
    return torch.zeros(count, dtype=torch.float64).index_add_(0, states.rollout, each)


@pytest.mark.parametrize(
    ("masks", "samples"), [("counts", 3), ("counts", 5), ("coupled_counts", 4)]
)
def test_drawn_masks_estimate_what_all_masks_give(masks, samples):
    table = -torch.rand(2**4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (exact,) = estimates(1, Scoring([], [], samples=15), table).tolist()
    found = estimates(20000, Scoring([], [], samples, masks), table)
    error = found.std() / 20000**0.5
    assert abs(found.mean() - exact) < 4 * error and error < 1e-2
    assert found.std() > 0.01, "they are draws"


def test_all_masks_are_listed_where_that_costs_no_more():
    assert [listed(n, 128) for n in (1, 7, 8, 400)] == [True, True, False, False]
    states = masked_states(rollout(2, 3), Scoring([], [], samples=7), seed=0)
    weights = dict.fromkeys((1, 2, 4), 1 / 3) | dict.fromkeys((3, 5, 6), 1 / 6) | {7: 1 / 3}
    numbers = (states.hidden.long() << torch.arange(3)).sum(1).tolist()
    assert numbers == 2 * list(range(1, 8))
    assert states.likelihood.tolist() == pytest.approx([weights[n] for n in numbers])


def _opened(*changes, world_size=1):
    found = find_target(HF, overrides=[*SETTINGS, *changes])
    return open_model(resolved_model(found.settings, world_size=world_size), found.checkpoint)


def _scores(several, *changes):
    with _opened(*changes) as model:
        return [lead(model, job) for job in several]


def _by_orders():
    """Return the mean over all orders of the sum of log p(token | those before it in the order)."""
    with _opened() as model:
        mask, total = model.run.mask_id, 0.0
        orders = list(itertools.permutations(range(len(TEXT))))
        for order in orders:
            for place, chosen in enumerate(order):
                row = CONTEXT + [TEXT[i] if i in order[:place] else mask for i in range(len(TEXT))]
                canvas, scored = torch.tensor([row]), torch.zeros(1, len(row), dtype=torch.bool)
                scored[0, len(CONTEXT) + chosen] = True
                rows = pack(canvas, torch.tensor([len(row)]), scored)
                (logits,) = forward_rows(model.network, [rows], lambda _, logits: logits)
                vocabulary = logits[0, : model.settings.model.vocab_size].double()
                total += float(vocabulary.log_softmax(0)[TEXT[chosen]])
        return total / len(orders)


def test_the_bound_is_the_mean_log_likelihood_over_all_orders():
    (expected,) = run_ranks(1, _by_orders)
    several = [
        Scoring([CONTEXT], [TEXT], samples=7),
        Scoring([CONTEXT], [TEXT], samples=4),
        Scoring([CONTEXT] * VOCABULARY, [[token] for token in range(VOCABULARY)], samples=1),
        Scoring([CONTEXT, [5], CONTEXT], [[7] * 12, [8], TEXT], samples=4),
        Scoring([CONTEXT], [[7] * 12], samples=4),
    ]
    ((exact,), (drawn,), single, mixed, (alone,)) = run_ranks(1, _scores, several)[0]
    assert exact.logprob == pytest.approx(expected, abs=1e-5)
    [[cached], [four]] = run_ranks(1, _scores, several[:2], "sampling.policy=cached")[0]
    assert (cached, four) == (exact, drawn), "a bound is of the model, whatever samples"
    assert abs(drawn.logprob - expected) > 1e-4, "four of seven masks are an estimate"
    chances = torch.tensor([found.logprob for found in single]).exp()
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-5), "one token has its probability"
    assert [found.is_greedy for found in single].count(True) == 1
    best = max(range(VOCABULARY - 1), key=lambda token: float(chances[token]))
    assert single[best].is_greedy
    assert mixed[0].logprob == pytest.approx(alone.logprob, abs=1e-5), "no other text matters"
    assert mixed[2].logprob == pytest.approx(drawn.logprob, abs=1e-5)
