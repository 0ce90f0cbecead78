"""A row's logits under the te spec do not depend on the rows it is packed with.

The stand-ins sum in float64, so every bit agrees. On a GPU bits may differ: there the order
of a sum may depend on how many tokens there are. It proves that no row, and no scale of FP8
values, is computed from another row where the recipe promises so.
"""

import pytest
import torch

from tests.ranks import run_ranks
from tests.te.models import (
    BF16,
    FP8,
    LENGTHS,
    MXFP8,
    TENSORWISE,
    VARIANTS,
    distance,
    disturb,
    logits,
    opened,
    random_rows,
)

OTHERS = (30, 2)
PRECISIONS = {"bf16": [BF16], "blockwise": [FP8], "mxfp8": [FP8, MXFP8]}


def _both_ways(overrides):
    """Return each row's logits in one pack, alone, and packed with other rows."""
    _, engine = opened(*overrides)
    disturb(engine.network)
    rows, others = random_rows(), random_rows(OTHERS)
    packed = logits(engine.network, rows).split(LENGTHS)
    alone = [logits(engine.network, [row]) for row in rows]
    longer = [logits(engine.network, [others[0], row, others[1]])[30:-2] for row in rows]
    return packed, alone, longer


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_a_row_is_computed_from_itself_alone(precision, variant):
    [(packed, alone, longer)] = run_ranks(1, _both_ways, [*precision, *VARIANTS[variant]])
    for number, row in enumerate(packed):
        assert float(row.std()) > 0.1
        assert torch.equal(row, alone[number]) and torch.equal(row, longer[number])


def test_tensorwise_scales_are_of_all_rows():
    """The counterexample: one scale for all tokens, set by the largest value of any row."""
    [(packed, alone, longer)] = run_ranks(1, _both_ways, [FP8, TENSORWISE])
    differences = [distance(a, b) for a, b in zip(packed, alone, strict=True)]
    differences += [distance(a, b) for a, b in zip(packed, longer, strict=True)]
    assert 0 < max(differences) < 0.2
