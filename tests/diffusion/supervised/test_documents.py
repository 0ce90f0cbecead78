"""Texts of a row that do not see each other: packed rows of their own, with the row's masks."""

from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings, SftSettings
from agrpo_megatron.diffusion.supervised.examples import Responses, sft_batches

MASK, END = 99, 0
SAMPLING = SamplingSettings(block_length=2, block_origin="row")
# Texts begin after each 0. The last row is [0][0], of which nothing can be trained.
ROWS = [[1, 2, 3, 0, 4, 5, 0, 6], [0, 7, 8, 9, 10, 11], [12, 13, 14], [0, 0]]
TEXTS = [[[1, 2, 3, 0], [4, 5, 0]], [[7, 8, 9, 10, 11]], [[12, 13, 14]], []]


def _responses(*, apart):
    """Return prompts and responses as `training.supervised.drawn.join_rows` makes them."""
    prompts, tokens = [], torch.zeros(len(ROWS), 8, dtype=torch.int64)
    trained = torch.zeros(len(ROWS), 8, dtype=torch.bool)
    cuts = [[place for place in range(1, len(row)) if row[place - 1] == END] for row in ROWS]
    for number, row in enumerate(ROWS):
        marks = [place > 0 and place not in cuts[number] for place in range(len(row))]
        before = marks.index(True) if any(marks) else 0
        prompts.append(torch.tensor(row[:before], dtype=torch.int64))
        tokens[number, : len(row) - before] = torch.tensor(row[before:])
        trained[number, : len(row) - before] = torch.tensor(marks[before:])
    lengths = torch.tensor([len(row) for row in ROWS]) - torch.tensor([len(p) for p in prompts])
    return prompts, Responses(tokens, lengths, trained, cuts if apart else None)


def _batches(chunks, *, apart=True, sft=None, **options):
    prompts, responses = _responses(apart=apart)
    ids = torch.arange(len(ROWS))
    given = {"mask_id": MASK, "seed": 3, "sampling": SAMPLING, **options}
    return sft_batches(prompts, responses, ids, chunks, sft=sft or SftSettings(), **given)


def _segments(rows):
    return [part.tolist() for part in rows.tokens.split(rows.cu_seqlens.diff().tolist())]


@pytest.mark.parametrize("shift", [False, True])
def test_each_text_is_a_row_with_the_masks_of_its_row(shift):
    model = ModelSettings(shift=shift)
    (apart,) = _batches([torch.arange(4)], model=model)
    (joined,) = _batches([torch.arange(4)], model=model, apart=False)
    for name in ("targets", "weights", "sources"):
        assert torch.equal(getattr(apart, name), getattr(joined, name))
    tokens = apart.rows.tokens.clone()
    assert (tokens[apart.rows.scored + shift] == MASK).all() and len(apart.targets) > 3
    tokens[apart.rows.scored + shift] = apart.targets
    assert _segments(replace(apart.rows, tokens=tokens)) == sum(TEXTS, [])


def test_a_block_model_copies_each_text():
    """Also Nemotron's, whose next tokens are predicted within the text."""
    model = ModelSettings(attention="causal_context", block_length=2)
    sft = SftSettings(autoregressive_weight=1.0)
    (found,) = _batches([torch.arange(4)], model=model, sft=sft)
    is_masked = found.rows.tokens[found.rows.scored] == MASK
    assert len(found.rows.patterns or []) == 4
    for text, segment in zip(sum(TEXTS, []), _segments(found.rows), strict=True):
        assert segment[: len(text)] == text
        assert all(a in (b, MASK) for a, b in zip(segment[-1:0:-1], text[:0:-1], strict=False))
    follows = found.rows.scored[~is_masked] + 1
    assert torch.equal(found.rows.tokens[follows], found.targets[~is_masked])
    assert sorted(found.targets[~is_masked].tolist()) == sorted(
        token for text in sum(TEXTS, []) for token in text[1:]
    )
    assert found.sources[~is_masked].tolist() == [0] * 5 + [1] * 4 + [2] * 2


def test_micro_batches_and_annealing_keep_texts_apart():
    (whole,) = _batches([torch.arange(4)], share=0.0)
    assert [row[0].length for row in whole.rows.patterns or []] == [4, 3, 5, 3]
    parts = _batches([torch.tensor([1, 3]), torch.tensor([3]), torch.tensor([], dtype=torch.int64)])
    assert _segments(parts[0].rows)[0][0] == 7
    assert [len(part.targets) for part in parts[1:]] == [0, 0]
    assert [_segments(part.rows) for part in parts[1:]] == [[[MASK]], [[MASK]]]
