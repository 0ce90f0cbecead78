"""Packed rows: nothing lost, nothing padded, never above the token budget."""

import torch

from agrpo_megatron.diffusion.packing import make_canvas, pack, split_by_budget

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


def test_split_takes_every_row_once_longest_first_within_the_budget():
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0))
    for budget in (1, 39, 40, 100, 10_000):
        chunks = split_by_budget(lengths, budget)
        order = torch.cat(chunks)
        assert sorted(order.tolist()) == list(range(200))
        assert (lengths[order].diff() <= 0).all()
        assert all(int(lengths[chunk].sum()) <= budget or len(chunk) == 1 for chunk in chunks)
        for one, two in zip(chunks, chunks[1:], strict=False):
            assert int(lengths[one].sum() + lengths[two[0]]) > budget


def test_no_rows_make_no_batches():
    canvas, lengths = make_canvas([], torch.zeros(0, 4, dtype=torch.int64))
    assert canvas.shape == (0, 4) and lengths.dtype == torch.int64
    assert split_by_budget(lengths, 10) == []
