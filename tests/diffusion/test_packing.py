"""Packed rows: nothing lost, nothing padded; micro-batches within the budget, equal by rank."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrpo_megatron.diffusion.packing import assign_rows, make_canvas, pack, pack_scored
from agrpo_megatron.types import PackedRows

torch.set_num_threads(1)


def test_pack_lays_rows_end_to_end():
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([4])]
    canvas, lengths = make_canvas(prompts, torch.tensor([[7, 8], [9, 7], [8, 9]]))
    assert canvas.tolist() == [[1, 2, 3, 7, 8], [9, 7, 0, 0, 0], [4, 8, 9, 0, 0]]
    scored = torch.zeros_like(canvas, dtype=torch.bool)
    scored[0, 4] = scored[1, 0] = scored[2, 2] = True
    rows = pack(canvas, lengths + 2, scored)
    assert rows.tokens.tolist() == [1, 2, 3, 7, 8, 9, 7, 4, 8, 9]
    assert rows.cu_seqlens.tolist() == [0, 5, 7, 10] and rows.cu_seqlens.dtype == torch.int32
    assert rows.scored.tolist() == [4, 5, 9]
    assert list(rows.bounds) == [0, 5, 7, 10]


def test_bounds_are_read_from_the_tensor_only_where_the_host_does_not_know_them():
    bounds = torch.tensor([0, 2, 3], dtype=torch.int32)
    ids = torch.zeros(3, dtype=torch.int64)
    assert PackedRows(ids, bounds, ids).bounds == [0, 2, 3]
    assert PackedRows(ids, bounds, ids, (0, 2, 3)).bounds == (0, 2, 3)


def test_packing_scored_places_is_packing_their_marks():
    random = torch.Generator().manual_seed(0)
    canvas = torch.randint(50, (5, 9), generator=random)
    lengths = torch.tensor([9, 4, 7, 1, 9])
    marks = torch.rand(5, 9, generator=random) < 0.5
    marks &= torch.arange(9) < lengths[:, None]
    for shift in (False, True):
        whole = pack(canvas, lengths, marks, shift=shift)
        places = pack_scored(canvas, lengths.tolist(), *marks.nonzero(as_tuple=True), shift=shift)
        for field in ("tokens", "cu_seqlens", "scored"):
            assert torch.equal(getattr(whole, field), getattr(places, field))
        flat = marks[torch.arange(9) < lengths[:, None]].nonzero().squeeze(1)
        first = torch.isin(flat, whole.cu_seqlens[:-1])
        assert torch.equal(whole.scored, flat - (~first).long() if shift else flat)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=60),
    budget=st.integers(1, 200),
    ranks=st.integers(1, 4),
    multiple=st.sampled_from([1, 2, 4]),
    attention=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_every_row_has_one_place_within_the_budget(lengths, budget, ranks, multiple, attention):
    sizes = torch.tensor(lengths, dtype=torch.int64)
    options = {"budget": budget, "ranks": ranks, "attention": attention, "multiple": multiple}
    shares = assign_rows(sizes, **options)
    assert len(shares) == ranks
    (count,) = {len(share) for share in shares}
    assert count >= 1 and count % multiple == 0
    chunks = [chunk for share in shares for chunk in share]
    assert sorted(torch.cat(chunks).tolist()) == list(range(len(lengths)))
    assert all(int(sizes[chunk].sum()) <= budget or len(chunk) == 1 for chunk in chunks)
    again = assign_rows(sizes, **options)
    assert [[c.tolist() for c in share] for share in again] == [
        [c.tolist() for c in share] for share in shares
    ]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    ranks=st.integers(2, 4),
    attention=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_micro_batches_cost_the_same_but_for_a_row(lengths, ranks, attention):
    """Where no budget interferes, as a greedy spread must: no two differ by more than one row."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    costs = sizes + attention * sizes**2
    shares = assign_rows(sizes, budget=10**9, ranks=ranks, attention=attention)
    totals = [float(costs[torch.cat(share)].sum()) for share in shares]
    assert max(totals) - min(totals) <= float(costs.max()) * (1 + 1e-9)


def test_the_square_of_the_length_counts():
    """A row of 100 tokens costs as much as 200 of one token where attention is a hundredth."""
    sizes = torch.tensor([100] + [1] * 200)
    shares = assign_rows(sizes, budget=10**9, ranks=2, attention=0.01)
    assert min(len(torch.cat(share)) for share in shares) <= 3


def test_no_rows_make_one_empty_micro_batch_for_each_rank():
    canvas, lengths = make_canvas([], torch.zeros(0, 4, dtype=torch.int64))
    assert canvas.shape == (0, 4) and lengths.dtype == torch.int64
    shares = assign_rows(lengths, budget=10, ranks=2, attention=0.0)
    assert [[chunk.tolist() for chunk in share] for share in shares] == [[[]], [[]]]
