"""Rows as prompts and responses: what padding adds, and which rows an iteration draws."""

from types import SimpleNamespace

import numpy
import pytest
import torch

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.tasks.supervised.example import Example
from agrpo_megatron.tasks.supervised.examples import Supervised
from agrpo_megatron.text.replies import TokenRow
from agrpo_megatron.training.supervised.drawn import join_rows, open_stream
from tests.training.tiny import tiny

EOS = 1


def row(*ids: int, trained: str) -> TokenRow:
    return TokenRow(
        numpy.array(ids, numpy.int32), numpy.array([mark == "x" for mark in trained], numpy.bool_)
    )


SHORT = row(5, 6, 7, trained=".xx")
LONG = row(8, 9, 10, 11, 12, 13, trained="..x.xx")


@pytest.mark.parametrize(
    "padding, origin, lengths",
    [
        ("none", "completion", [2, 4]),
        ("batch", "completion", [5, 4]),  # rows of 6 tokens
        ("completion", "completion", [8, 8]),
        ("block", "completion", [4, 4]),  # responses of whole blocks
        ("block", "row", [3, 6]),  # rows of whole blocks: 4 and 8 tokens
    ],
)
def test_padding_is_end_of_text_that_is_trained(padding, origin, lengths):
    sampling = SamplingSettings(completion_length=8, block_length=4, block_origin=origin)
    drawn = join_rows(
        [SHORT, LONG],
        ["a", "b"],
        padding=padding,
        sampling=sampling,
        eos_id=EOS,
        device=torch.device("cpu"),
    )
    assert [prompt.tolist() for prompt in drawn.prompts] == [[5], [8, 9]]
    assert drawn.responses.lengths.tolist() == lengths
    for place, (own, marks) in enumerate([([6, 7], "xx"), ([10, 11, 12, 13], "x.xx")]):
        tokens, trained = drawn.responses.tokens[place], drawn.responses.trained[place]
        added = lengths[place] - len(own)
        assert tokens[: lengths[place]].tolist() == own + [EOS] * added
        expected = [mark == "x" for mark in marks] + [True] * added
        assert trained.tolist() == expected + [False] * (len(trained) - lengths[place])


def stream(shares, rows_of_each=1):
    """Return what a run of two sources, of four and two examples, draws: (source row, reply)."""
    numbers = range(sum(count for count, _ in shares))
    replies = range(rows_of_each)
    examples = [
        Example(f"row {n}", [row(2, 10 * n + reply, trained=".x") for reply in replies], b"")
        for n in numbers
    ]
    settings = tiny("sft.data=rows.jsonl", "sft.epochs=1", "sft.padding=none")
    ranks = SimpleNamespace(device=torch.device("cpu"))
    data = Supervised(examples, shares, epoch=6)
    run = SimpleNamespace(settings=settings, ranks=ranks, supervised=data, eos_id=EOS)
    found = open_stream(run)  # type: ignore[arg-type]
    assert found.epoch == 6
    return found


def replies(drawn):
    return drawn.responses.tokens[:, 0].tolist()


def test_each_row_is_visited_once_per_epoch_in_another_order():
    draw = stream([(6, 1.0)]).draw
    first, second = replies(draw(range(6))), replies(draw(range(6, 12)))
    assert sorted(first) == sorted(second) == [0, 10, 20, 30, 40, 50]
    assert first != second
    assert replies(draw(range(4, 9))) == first[4:] + second[:3]  # whatever the batches are
    assert draw(range(2)).names == [f"row {reply // 10}" for reply in first[:2]]


def test_sources_take_turns_by_weight():
    """Weights 4 and 4 of four and two rows: the second source is visited twice per epoch."""
    picked = replies(stream([(4, 4.0), (2, 4.0)]).draw(range(8)))
    assert [reply // 10 >= 4 for reply in picked].count(True) == 4
    assert sorted(reply for reply in picked if reply < 40) == [0, 10, 20, 30]
    assert sorted(reply for reply in picked if reply >= 40) == [40, 40, 50, 50]


def test_one_of_several_replies_is_drawn_at_each_visit():
    draw = stream([(6, 1.0)], rows_of_each=3).draw
    found = [replies(draw(range(6 * n, 6 * n + 6))) for n in range(50)]
    counts = [sum(reply % 10 == n for epoch in found for reply in epoch) for n in range(3)]
    assert sum(counts) == 300 and min(counts) > 75  # 100 each, standard deviation 8
    assert found[0] == replies(draw(range(6)))
