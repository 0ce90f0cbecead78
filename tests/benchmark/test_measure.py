"""Clocks, memory, ratios and made-up rewards."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from agrpo_megatron.benchmark import measure
from agrpo_megatron.benchmark.measure import Products, interleaved, peak_bytes, speedup
from agrpo_megatron.benchmark.ours import made_up_rewards
from agrpo_megatron.config.settings import AlgorithmSettings, ModelSettings
from agrpo_megatron.estimators.advantages import advantages

CPU = torch.device("cpu")


def test_peak_memory_is_the_most_that_is_held_at_once():
    """Two tensors of 4 MiB, one after the other or both at once, besides one from before."""
    before = torch.zeros(2**20)

    def in_turn():
        for _ in range(2):
            torch.zeros(2**20).add_(before)

    def together():
        return [torch.zeros(2**20).add_(before) for _ in range(2)]

    assert peak_bytes(in_turn, CPU) == 4 * 2**20
    assert peak_bytes(together, CPU) == 8 * 2**20


def test_what_a_run_keeps_for_the_next_one_is_not_counted():
    """Of a kept tensor that each run makes anew, the next run holds both for a moment."""
    states, replaced = list[torch.Tensor](), dict[str, torch.Tensor]()

    def keeps():
        states.extend([] if states else [torch.zeros(2**20)])

    def replaces():
        replaced["kept"] = torch.zeros(2**20)
        torch.zeros(2**19)

    assert peak_bytes(keeps, CPU) == 0
    assert peak_bytes(replaces, CPU) == 4 * 2**20


def test_runs_take_turns():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    spent = interleaved(runs, repeats=3, device=CPU)
    assert order == ["a", "b"] * 3
    assert [len(seconds) for seconds in spent.values()] == [3, 3]


def test_the_speedup_is_a_ratio_of_medians_with_its_spread():
    assert speedup([1.0, 2.0, 4.0], [6.0, 6.0, 8.0]) == {"median": 3.0, "min": 2.0, "max": 6.0}


def test_products_have_the_shapes_of_a_layer():
    """Four matrices; and, of both heads of two rows, queries with keys and weights with values."""
    model = ModelSettings(hidden_size=8, ffn_hidden_size=16, num_attention_heads=2)
    shape = {"rows": 2, "length": 5, "dtype": torch.float32, "device": CPU}
    matrices, all_ = Products(model, **shape), Products(model, **shape, with_attention=True)
    with FlopCounterMode(display=False) as counter:
        all_()
    assert matrices.flops == matrices.times * 2 * 10 * (4 * 8 * 8 + 3 * 8 * 16)
    assert all_.flops // all_.times == matrices.flops // matrices.times + 4 * 2 * 5 * 5 * 8
    assert counter.get_total_flops() == all_.flops


def test_seconds_within_a_module_leave_out_what_is_around_it(monkeypatch):
    """A clock that each reading moves by a second: one for each pass through the module."""
    ticks = itertools.count()
    monkeypatch.setattr(measure, "_now", lambda _: next(ticks))
    inner = torch.nn.Linear(2, 2)
    outer = torch.nn.Sequential(inner, torch.nn.ReLU(), inner)
    assert measure.seconds_within(inner, lambda: outer(torch.zeros(1, 2)), CPU) == 2
    assert not inner._forward_hooks and not inner._forward_pre_hooks


@pytest.mark.parametrize(("count", "zeros"), [(8, 3), (8, 0), (5, 2), (5, 0), (9, 6), (2, 0)])
def test_made_up_rewards_leave_so_many_advantages_at_zero(count, zeros):
    algorithm = replace(AlgorithmSettings(), group_size=count)
    found = advantages(torch.tensor(made_up_rewards(count, zeros)), algorithm)
    assert int((found == 0).sum()) == zeros and float(found.sum()) == 0
