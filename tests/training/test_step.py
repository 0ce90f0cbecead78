"""Metrics of micro-batches and ranks are combined: sums, maxima and percentiles."""

import torch
import torch.distributed as dist

from agrpo_megatron.training import step
from tests.ranks import run_ranks
from tests.training.tiny import open_session


def _reduced(parts):
    """Combine the micro-batches that each rank has, with values of single tokens."""
    session, _ = open_session(world_size=dist.get_world_size())
    computed = [
        {
            "loss": torch.tensor(float(len(values))),
            "ratio_max_error": torch.tensor(max(values, default=0.0)),
            "ratio_p99_error": torch.tensor(values),
        }
        for values in parts[dist.get_rank()]
    ]
    return step._reduced(computed, session.run.ranks, examples=2)


def test_the_percentile_is_that_of_all_tokens_of_all_ranks():
    """Of 200 tokens, the 198th; tokens without weight, here -1, do not count."""
    values = [float(number) for number in range(1, 201)]
    mine, others = values[::3], sorted(set(values) - set(values[::3]))
    parts = [[mine[:20], [*mine[20:], -1.0, -1.0]], [others, []]]
    for found in run_ranks(2, _reduced, parts):
        assert found == {"loss": 101.0, "ratio_max_error": 200.0, "ratio_p99_error": 198.0}
    flat = [mine + others]
    assert run_ranks(1, _reduced, [flat])[0]["ratio_p99_error"] == 198.0


def test_percentiles_of_few_values_are_one_of_them():
    for values, expected in (([], 0.0), ([-1.0], 0.0), ([0.5], 0.5), ([3.0, 1.0, 2.0], 3.0)):
        assert step._percentile_99(torch.tensor(values)) == expected
    hundred = torch.arange(100.0)
    assert step._percentile_99(hundred) == 98.0
