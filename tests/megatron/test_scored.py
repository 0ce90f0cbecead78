"""The last layer on scored tokens alone equals the whole layer, in logits and in gradients."""

from dataclasses import replace

import pytest
import torch

from agrpo_megatron.megatron.layers.attention import PackedAttention
from agrpo_megatron.megatron.layers.packed import packed_layout
from agrpo_megatron.megatron.layers.scored import filled, queries_of
from tests.megatron.test_model import LENGTHS, VARIANTS, _built, _random_rows, pack
from tests.ranks import run_ranks

# Scored tokens of rows of 7, 7, 3, 11 and 1 tokens.
SCORED = {
    "equally many": [0, 3, 8, 9, 15, 16, 18, 27],
    "ragged": [1, 2, 3, 4, 5, 8, 20],
    "one": [11],
    "the only token of a row": [28],
    "all of a row": list(range(17, 28)),
    "none": [],
}


def _compared(model):
    """Return by case the largest error of logits and gradients, and the rows of the queries."""
    _, chunk = _built(model)
    rows, found, counts = pack(_random_rows()), {}, []
    layer = next(m for m in reversed([*chunk.modules()]) if isinstance(m, PackedAttention))
    layer.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    for name, places in SCORED.items():
        sides = []
        for takes_queries in (True, False):
            chunk.takes_queries = takes_queries
            logits = chunk(replace(rows, scored=torch.tensor(places, dtype=torch.int64)))
            loss = (logits * torch.linspace(-1, 1, 50)).sum()
            grads = torch.autograd.grad(loss, list(chunk.parameters()))
            sides.append([logits.detach(), *grads])
        errors = [float((a - b).abs().max()) for a, b in zip(*sides, strict=True) if a.numel()]
        found[name] = max(errors), float(sides[0][1].abs().max()), counts[-2:]
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_queries_of_scored_tokens_change_neither_logits_nor_gradients(variant):
    found = run_ranks(1, _compared, VARIANTS[variant])[0]
    for name, (error, size, (queries, whole)) in found.items():
        assert error < 2e-4 * max(1, size), name
        assert queries == max(4, len(SCORED[name])) and whole == sum(LENGTHS)
        assert (size > 0) == bool(SCORED[name]), name


def _laid_out():
    _, chunk = _built(VARIANTS["grouped"])
    layout = packed_layout(pack(_random_rows()), angles=chunk.angles, context=chunk.ranks.context)
    places = torch.tensor([0, 3, 8, 9, 17, 18, 19, 20, 21])
    layout.scored = filled(places, 4)
    queries = queries_of(layout, places)
    assert queries is not None
    shapes = [(run.rows, run.queries, run.keys, run.start) for run in queries.runs]
    flat = torch.cat([grid.flatten() for grid in queries.grids])
    return shapes, flat[queries.order].tolist()


def test_rows_of_a_call_have_equally_many_queries():
    """Two rows of two scored tokens are padded to four; a row of three without any has no call."""
    shapes, order = run_ranks(1, _laid_out)[0]
    assert shapes == [(2, 4, 7, 0), (1, 8, 11, 17)]
    assert order == [*range(9), 0, 0, 0]  # the last are copies that fill up a product
