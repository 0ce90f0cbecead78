"""Rows of preference data in the shapes that trl reads, and wrong ones."""

import pytest

from agrpo_megatron.tasks.supervised.pairs import read_pairs
from agrpo_megatron.tasks.supervised.rows import read_conversations
from agrpo_megatron.types import Message
from tests.tasks.supervised.test_rows import write

ASK, GOOD, BAD = "What is 2 + 2?", "It is 4.", "It is 5."
USER, RIGHT, WRONG = Message("user", ASK), Message("assistant", GOOD), Message("assistant", BAD)
MORE = (USER, RIGHT, Message("user", "And 3 + 3?"))


def _list(*messages):
    return [message._asdict() for message in messages]


def _read(folder, *rows, **options):
    source = write(folder, *rows)
    found, note = read_pairs(source, key="sft.data", **options)
    return [pair for _, pair in found], note.replace(source, "pairs.jsonl")


SHAPES = {
    "texts": ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, (USER,), False),
    "a list after a text": (
        {"prompt": ASK, "chosen": _list(USER, RIGHT), "rejected": _list(USER, WRONG)},
        (USER,),
        True,
    ),
    "an explicit prompt": (
        {"prompt": _list(*MORE), "chosen": _list(RIGHT), "rejected": _list(WRONG)},
        MORE,
        True,
    ),
    "an implicit prompt": (
        {"chosen": _list(*MORE, RIGHT), "rejected": _list(*MORE, WRONG), "score": 1},
        MORE,
        True,
    ),
    "a question": ({"question": ASK, "chosen": GOOD, "rejected": BAD}, (USER,), False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_follows_the_common_beginning_is_compared(tmp_path, shape):
    row, start, is_chat = SHAPES[shape]
    (pair,), note = _read(tmp_path, row)
    for conversation, reply in zip(pair, (RIGHT, WRONG), strict=True):
        assert conversation.messages == (*start, reply)
        assert conversation.replies == (len(start),) and conversation.is_chat == is_chat
    assert pair.is_useful
    assert ("plain text without the chat template" in note) != is_chat
    assert ("not used: score" in note) == ("score" in row)


def test_texts_without_a_prompt_are_split_where_they_differ(tmp_path):
    """As trl does, the space before the first character that differs belongs to the answers."""
    row = {"chosen": f"Q: {ASK} A: four", "rejected": f"Q: {ASK} A: six"}
    (pair,), note = _read(tmp_path, row)
    assert [m.content for m in pair.chosen.messages] == [f"Q: {ASK} A:", " four"]
    assert [m.content for m in pair.rejected.messages] == [f"Q: {ASK} A:", " six"]
    assert note == (
        "pairs.jsonl: 1 pairs read as chosen against rejected after a common beginning, plain "
        "text without the chat template"
    )


def test_turns_that_differ_are_all_compared(tmp_path):
    """Conversations that part early: two replies of one, one of the other."""
    longer = _list(USER, WRONG, USER, RIGHT)
    (pair,), _ = _read(tmp_path, {"chosen": longer, "rejected": _list(USER, RIGHT)})
    assert pair.chosen.replies == (1, 3) and pair.rejected.replies == (1,)


def test_the_user_names_columns_and_the_template(tmp_path):
    row = {"ask": ASK, "best": GOOD, "worst": BAD}
    names = {"prompt": "ask", "chosen": "best", "rejected": "Worst"}
    (pair,), _ = _read(tmp_path, row, columns=names, as_chat=True)
    assert pair.chosen.messages == (USER, RIGHT) and pair.chosen.is_chat


def test_pairs_read_as_single_rows_name_the_loss(tmp_path):
    source = write(tmp_path, {"prompt": ASK, "chosen": GOOD, "rejected": BAD})
    with pytest.raises(ValueError, match="columns of preference pairs; set sft.loss=vrpo"):
        read_conversations(source, key="sft.data")


@pytest.mark.parametrize("reply", [GOOD, ""])
def test_equal_answers_and_empty_ones_are_no_pair(tmp_path, reply):
    (pair,), _ = _read(tmp_path, {"prompt": ASK, "chosen": GOOD, "rejected": reply})
    assert not pair.is_useful


@pytest.mark.parametrize(
    "row, options, said",
    [
        (
            {"prompt": ASK, "chosen": GOOD},
            {},
            "there is no rejected; the columns are prompt, chosen",
        ),
        ({"messages": _list(USER, RIGHT)}, {}, "needs the columns chosen and rejected"),
        ({"chosen": GOOD, "rejected": 7.5, "prompt": [1]}, {}, "row 1: column prompt: message 1"),
        ({"chosen": GOOD, "rejected": BAD}, {"columns": {"reply": "chosen"}}, "sft.columns.reply"),
        ({"chosen": GOOD, "rejected": {"a": 1}, "prompt": ASK}, {}, "which is not text"),
    ],
)
def test_wrong_rows_name_the_column(tmp_path, row, options, said):
    with pytest.raises(ValueError, match="sft.data=.*chats.jsonl") as error:
        _read(tmp_path, row, **options)
    assert said in str(error.value) and "\n" not in str(error.value)
