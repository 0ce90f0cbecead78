"""Who sees whom: the definition against rules written out, token by token."""

import torch

from agrpo_megatron.diffusion.patterns import (
    ahead,
    block_causal,
    full,
    inside,
    places_of,
    replay,
    row_length,
    span_keys,
    span_mask,
    span_slice,
    visible,
    visible_pairs,
)

CPU = torch.device("cpu")


def _mask(rows):
    tokens = torch.arange(sum(map(row_length, rows)))
    return visible(places_of(rows, CPU), tokens[:, None], tokens[None])


def test_all_tokens_of_a_full_row_see_each_other_and_no_other_row():
    assert torch.equal(
        _mask([full(2), full(3)]), torch.block_diag(*map(torch.ones, [(2, 2), (3, 3)])) > 0
    )


def test_a_block_causal_token_sees_earlier_blocks_and_its_own():
    places = torch.arange(11)
    assert torch.equal(_mask([block_causal(11, 4)]), places[None] // 4 <= places[:, None] // 4)
    moved = (places + 1) // 4  # a block begins at 3, so one at -1
    assert torch.equal(_mask([block_causal(11, 4, origin=3)]), moved[None] <= moved[:, None])


def test_blocks_of_one_token_are_causal():
    assert torch.equal(_mask([block_causal(5, 1)]), torch.ones(5, 5).tril() > 0)


def test_a_token_sees_a_share_of_those_after_it():
    for share, more in [(0.0, 0), (0.25, 2), (0.5, 5), (1.0, 10)]:
        places = torch.arange(11)
        expected = places[None] <= places[:, None] + more
        mask = _mask([ahead(11, share)])
        assert torch.equal(mask, expected)
        assert visible_pairs(ahead(11, share)) == int(expected.sum())
    assert span_mask(ahead(11, 1.0), 0, CPU) is None
    assert _mask([ahead(1, 0.0)]).all()


def test_a_copy_sees_the_context_before_its_block_and_its_own_block():
    """Context of 10 tokens, blocks of 4; the copies are tokens 4 to 9, then 8 to 9."""
    row = replay(10, 4, [(4, 6), (8, 2)], causal=False)
    mask = _mask([row])
    assert places_of([row], CPU).position.tolist() == [*range(10), *range(4, 10), 8, 9]
    owner = torch.tensor([0] * 10 + [1] * 6 + [2] * 2)
    position = places_of([row], CPU).position
    for query in range(18):
        for key in range(18):
            block, other = int(position[query]) // 4, int(position[key]) // 4
            if owner[query] == 0:
                expected = owner[key] == 0 and other <= block
            else:
                is_before = owner[key] == 0 and other < block
                expected = is_before or (owner[key] == owner[query] and other == block)
            assert bool(mask[query, key]) == expected, (query, key)


def test_a_causal_context_is_causal_and_its_copy_is_not():
    mask = _mask([replay(4, 4, [(4, 3)], causal=True)])
    assert torch.equal(mask[:4, :4], torch.ones(4, 4).tril() > 0)
    assert not mask[:4, 4:].any() and mask[4:].all()


def test_a_copy_inside_sees_the_context_around_its_block_and_itself():
    """Context of 7 tokens; two copies of tokens 2 to 4."""
    row = inside(7, (2, 5), 2)
    mask = _mask([row])
    assert places_of([row], CPU).position.tolist() == [*range(7), 2, 3, 4, 2, 3, 4]
    around = torch.tensor([True, True, False, False, False, True, True])
    assert torch.equal(mask[:7], torch.tensor([True] * 7 + [False] * 6).expand(7, 13))
    for first in (7, 10):
        own = torch.zeros(6, dtype=torch.bool)
        own[first - 7 : first - 4] = True
        assert torch.equal(mask[first : first + 3], torch.cat([around, own]).expand(3, 13))


def test_pairs_are_counted_as_the_mask_has_them():
    rows = [full(5), block_causal(11, 4, origin=3), replay(4, 4, [(4, 3)], causal=True)]
    rows += [inside(7, (2, 5), 2), inside(7, (0, 7), 1), inside(7, (5, 7), 3)]
    for row in [*rows, replay(10, 4, [(4, 6), (8, 2), (0, 4)], causal=False)]:
        assert visible_pairs(row) == int(_mask([row]).sum())


def test_the_mask_of_a_span_is_its_part_of_the_rows_mask():
    for row in (replay(10, 4, [(0, 10), (8, 2)], causal=False), inside(7, (2, 5), 2)):
        _check_spans(row)


def _check_spans(row):
    whole = _mask([row])
    for number in range(3):
        own = span_slice(row, number)
        parts = [whole[own, part] for part in span_keys(row, number)]
        mask, expected = span_mask(row, number, CPU), torch.cat(parts, 1)
        assert expected.all() if mask is None else torch.equal(mask, expected)
        assert whole[own].sum() == expected.sum(), "no token sees another copy"
    assert span_mask(full(3), 0, CPU) is None
