"""Rows of supervised data in the shapes that people have, and wrong ones."""

import json
from pathlib import Path

import pytest

from agrpo_megatron.tasks.supervised.rows import join_reply, read_conversations
from agrpo_megatron.text.replies import Conversation
from agrpo_megatron.types import Message

HI, HELLO, BYE, CIAO = "Hi", "Hello.", "Bye", "Ciao."
USER, REPLY = Message("user", HI), Message("assistant", HELLO)
TALK = (USER, REPLY, Message("user", BYE), Message("assistant", CIAO))
SYSTEM = Message("system", "Be kind.")
ROLES = ("user", "assistant", "user", "assistant")
MESSAGES = [{"role": r, "content": m.content} for r, m in zip(ROLES, TALK, strict=True)]
SHAREGPT = [{"from": "human" if m.role == "user" else "gpt", "value": m.content} for m in TALK]


def write(folder: Path, *rows: object) -> str:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(folder: Path, *rows: object, **options) -> tuple[list[Conversation], str]:
    source = write(folder, *rows)
    found, note = read_conversations(source, key="sft.data", **options)
    assert [number for number, _ in found] == list(range(1, len(rows) + 1))
    return [conversation for _, conversation in found], note.replace(source, "chats.jsonl")


@pytest.mark.parametrize(
    "row, messages, replies, said",
    {
        "OpenAI, TRL": ({"messages": MESSAGES}, TALK, (1, 3), "messages"),
        "a system column": (
            {"messages": MESSAGES, "system": "Be kind."},
            (SYSTEM, *TALK),
            (2, 4),
            "messages with system",
        ),
        "ShareGPT": ({"conversations": SHAREGPT}, TALK, (1, 3), "conversations"),
        "parts of a message": (
            {"messages": [MESSAGES[0], {**MESSAGES[1], "content": [{"text": "Hel"}, "lo."]}]},
            TALK[:2],
            (1,),
            "messages",
        ),
        "weight 0 is context": (
            {"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}, *MESSAGES[2:]]},
            TALK,
            (3,),
            "messages",
        ),
        "a first turn of the assistant is context": (
            {"messages": MESSAGES[1:]},
            TALK[1:],
            (2,),
            "messages",
        ),
        "prompt and response": (
            {"prompt": HI, "response": HELLO},
            TALK[:2],
            (1,),
            "prompt and response",
        ),
        "letter case": ({"Question": HI, "ANSWER": HELLO}, TALK[:2], (1,), "question and answer"),
        "a number": (
            {"question": HI, "answer": 42},
            (USER, Message("assistant", "42")),
            (1,),
            "question and answer",
        ),
        "Alpaca": (
            {"instruction": "Translate", "input": HI, "output": CIAO},
            (Message("user", "Translate\n\nHi"), TALK[3]),
            (1,),
            "instruction and output with input",
        ),
        "Alpaca with history": (
            {
                "instruction": BYE,
                "input": "",
                "output": CIAO,
                "system": "Be kind.",
                "history": [[HI, HELLO]],
            },
            (SYSTEM, *TALK),
            (2, 4),
            "instruction and output with input, system, history",
        ),
        "TRL's messages in both": (
            {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
            TALK,
            (1, 3),
            "prompt and completion",
        ),
        "no reply": ({"question": HI, "answer": " "}, None, (), "question and answer"),
        "no prompt": ({"question": None, "answer": HI}, None, (), "question and answer"),
        "no messages": ({"messages": []}, (), (), "messages"),
    }.values(),
)
def test_a_row_is_a_conversation(tmp_path, row, messages, replies, said):
    (found,), note = read(tmp_path, row)
    if messages is not None:
        assert found.messages == messages
    assert (found.replies, found.is_chat) == (replies, True)
    assert note == f"chats.jsonl: 1 rows read as {said}"


def test_prompt_and_completion_are_plain_text_as_in_trl(tmp_path):
    row = {"prompt": HI, "completion": HELLO, "id": 7}
    (found,), note = read(tmp_path, row)
    assert found == Conversation((USER, REPLY), (1,), is_chat=False)
    read_as = "chats.jsonl: 1 rows read as prompt and completion"
    assert note == f"{read_as}, plain text without the chat template; not used: id"
    (found,), note = read(tmp_path, row, as_chat=True)
    assert found == Conversation((USER, REPLY), (1,))
    assert note == f"{read_as}; not used: id"


def test_columns_by_other_names(tmp_path):
    row = {"Ask": HI, "text": HELLO, "answer": "no", "who": "Be kind."}
    columns = {"prompt": "Ask", "reply": "text", "system": "who"}
    (found,), note = read(tmp_path, row, columns=columns)
    assert found == Conversation((SYSTEM, USER, REPLY), (2,))
    assert note.endswith("read as ask and text with who; not used: answer")


GOOD = {"messages": MESSAGES}


@pytest.mark.parametrize(
    "row, said",
    {
        "no object": ([1], "row 2: must hold one object"),
        "other columns": ({"text": HI}, "row 2: no column messages; it has text"),
        "text": ({"messages": "Hi"}, "row 2: column messages holds 'Hi', which is not a list of"),
        "texts": ({"messages": ["Hi"]}, "row 2: column messages: message 1 is 'Hi'; give role"),
        "no content": (
            {"messages": [MESSAGES[0], {"role": "assistant"}]},
            "row 2: column messages: message 2 has no content; it has role",
        ),
        "null": (
            {"messages": [{"role": "user", "content": None}]},
            "row 2: column messages: message 1 has no content; it has role, content",
        ),
        "a picture": (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "row 2: column messages: message 1 holds parts that are not text: [{'type': 'image'}]",
        ),
        "a call": (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "row 2: column messages: message 1 holds tool_calls, which is not supported",
        ),
        "a weight": (
            {"messages": [{**MESSAGES[1], "weight": 0.5}]},
            "row 2: column messages: message 1 has the weight 0.5; use 1, or 0 for context",
        ),
        "half a character": (
            {"messages": [{"role": "user", "content": "a\ud83e"}]},
            r"message 1 has the content '\ud83e' at character 2, half of a character",
        ),
    }.values(),
)
def test_a_wrong_row_is_named_with_its_column(tmp_path, row, said):
    with pytest.raises(ValueError, match=r"^sft\.data=.*chats\.jsonl") as caught:
        read(tmp_path, GOOD, row)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row, columns, said",
    [
        ({"text": HI}, {}, "the columns are text: none of messages, conversations, prompt and"),
        (
            {"question": HI, "answer": HELLO, "solution": HELLO},
            {},
            "several of its columns could be meant; name them, as sft.columns={prompt: ask, reply",
        ),
        (GOOD, {"massages": "messages"}, "sft.columns.massages='messages': give a column for"),
        (GOOD, {"messages": "chat"}, "sft.columns.messages=chat: there is no such column, but m"),
        (GOOD, {"prompt": "messages"}, "must name the column of messages, or those of prompt and"),
        (GOOD, {"messages": 3}, "sft.columns.messages=3: give a column for any of mess"),
    ],
)
def test_columns_that_cannot_be_meant(tmp_path, row, columns, said):
    with pytest.raises(ValueError, match=r"^sft\.data=.*chats\.jsonl: ") as caught:
        read(tmp_path, row, columns=columns)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HI, "chosen": HELLO},
        {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:2]},
        {"prompt": MESSAGES[:1], "chosen": HELLO},
        {"prompt": HI, "chosen": MESSAGES[1:2]},
        {"prompt": HI, "chosen": MESSAGES[:2]},
        {"chosen": MESSAGES[:2]},
    ],
)
def test_a_prompt_joins_a_reply_of_any_shape(row):
    assert join_reply(row, "prompt", "chosen", as_chat=True) == Conversation((USER, REPLY), (1,))


def test_no_column_is_lost_where_prompt_or_reply_are_messages(tmp_path):
    """The input follows the prompt, and a history its system message."""
    more, before = Message("user", "12"), [["Bye", "Ciao."]]
    row = {"instruction": MESSAGES[:1], "input": "12", "output": HELLO}
    assert read(tmp_path, row)[0][0].messages == (USER, more, REPLY)
    row = {"instruction": "", "input": "12", "output": MESSAGES[1:2]}
    assert read(tmp_path, row)[0][0].messages == (more, REPLY)
    system = {"role": "system", "content": SYSTEM.content}
    row = {"instruction": [system, MESSAGES[0]], "output": HELLO, "history": before}
    row["system"] = "Another."
    assert read(tmp_path, row)[0][0].messages == (SYSTEM, *TALK[2:], USER, REPLY)
    row = {"instruction": MESSAGES[:1], "input": "12", "output": MESSAGES[:2]}
    with pytest.raises(ValueError, match="row 1: column output holds the prompt too, so the inp"):
        read(tmp_path, row)


def test_half_of_a_character_is_refused_in_a_history_too(tmp_path):
    row = {"instruction": HI, "output": HELLO, "history": [["Bye", "\ud83d"]]}
    with pytest.raises(ValueError, match="row 1: column history holds .* half of a character"):
        read(tmp_path, row)
