"""Rows of supervised data as conversations, in the shapes that people have."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from agrpo_megatron.tasks.data import (
    Row,
    convert_rows,
    has_column,
    listed,
    one_line,
    optional_column,
    valid_text,
    wrong_value,
)
from agrpo_megatron.tasks.row_sources import read_rows
from agrpo_megatron.tasks.supervised.columns import EXTRA, Shape, find_shape
from agrpo_megatron.text.replies import Conversation
from agrpo_megatron.types import Message

SPEAKERS = {  # of ShareGPT's files and their relatives
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}


def read_conversations(
    source: str,
    *,
    key: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    as_chat: bool | None = None,
) -> tuple[list[tuple[int, Conversation]], str]:
    """Return the numbered conversations of a file or data set, and a note on how it was read.

    Args:
        source, split: as `read_rows` has them.
        key: the setting of the source, for errors.
        columns: columns by role (see `ROLES`) where the user names them.
        as_chat: see `to_conversation`.

    Raises:
        ValueError: the source cannot be read, or a row holds something else; names row and column.
    """

    def find(names: Iterable[str], section: str) -> Found[Conversation]:
        shape = find_shape(names, columns or {}, key=section)
        make = partial(to_conversation, shape=shape, as_chat=as_chat)
        return Found(make, shape.names, f"rows read as {shape.text}", lambda talk: talk.is_chat)

    return read_shaped(source, find, key=key, split=split)


@dataclass(frozen=True)
class Found[T]:
    """How the rows of a source are read."""

    make: Callable[[Row], T]
    names: Collection[str]  # of the columns that are read, in small letters
    text: str  # for the note
    is_chat: Callable[[T], bool]


def read_shaped[T](
    source: str, find: Callable[[Iterable[str], str], Found[T]], *, key: str, split: str
) -> tuple[list[tuple[int, T]], str]:
    """Return what is made of the numbered rows of a source, and a note on how it was read.

    Args:
        find: from the names of all columns, and the setting that names some, to `Found`.

    Raises:
        ValueError: as `read_conversations`.
    """
    rows = read_rows(source, key=key, split=split)
    names = dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row)
    try:
        found = find(names, f"{key.rpartition('.')[0]}.columns")
    except ValueError as error:
        raise ValueError(f"{key}={source}: {error}") from None
    made = convert_rows(rows, found.make, key=key, source=source)
    is_plain = not any(found.is_chat(one) for _, one in made)
    unused = [one_line(name) for name in names if str(name).casefold() not in found.names]
    said = f"{source}: {len(made):,} {found.text}"
    said += ", plain text without the chat template" * is_plain
    return made, said + (f"; not used: {', '.join(unused)}" if unused else "")


def to_conversation(row: Row, shape: Shape, *, as_chat: bool | None = None) -> Conversation:
    """Return a row as a conversation; one without a reply to train names none.

    Args:
        as_chat: texts go through the chat template; None: all but prompt and completion do.

    Raises:
        KeyError: a column is missing.
        ValueError: a column holds something else; names the column.
    """
    columns = shape.columns
    for role, column in columns.items():
        if role not in EXTRA and not has_column(row, column):
            raise KeyError(column)
    system = _text(row, columns["system"]) if "system" in columns else ""
    opening = [_Turn("system", system)] if system else []
    if "messages" in columns:
        return _conversation(_opened(_turns(row, columns["messages"]), opening))
    prompt, reply = columns["prompt"], columns["reply"]
    if as_chat is None:
        as_chat = (prompt, reply) != ("prompt", "completion")
    history = _history(row, columns["history"]) if "history" in columns else []
    more = _text(row, columns["input"]) if "input" in columns else ""
    turns, is_chat = _joined(row, prompt, reply, more=more)
    is_chat = is_chat or as_chat or bool(opening or history)
    return _conversation(_opened(turns, opening, history), is_chat=is_chat)


def join_reply(row: Row, prompt: str, reply: str, *, as_chat: bool) -> Conversation:
    """Return the conversation of a prompt and a reply, each a text or a list of messages.

    A reply that is a list may hold the whole conversation: then the prompt is its first part, or
    missing in the row. The reply is the last place in `replies`.

    Args:
        prompt, reply: columns.
        as_chat: two texts go through the chat template, as a turn of the user and a reply.

    Raises:
        ValueError: a column holds something else; names the column.
    """
    turns, is_chat = _joined(row, prompt, reply)
    return _conversation(turns, is_chat=is_chat or as_chat)


class _Turn(NamedTuple):
    """A message as it was read."""

    role: str
    content: str
    is_trained: bool = True


def _conversation(turns: Sequence[_Turn], *, is_chat: bool = True) -> Conversation:
    """Return turns as a conversation; replies with text that follow something are trained."""
    replies = [
        place
        for place, turn in enumerate(turns)
        if turn.role == "assistant" and turn.is_trained and turn.content.strip()
        if any(earlier.content.strip() for earlier in turns[:place])
    ]
    messages = tuple(Message(turn.role, turn.content) for turn in turns)
    return Conversation(messages, tuple(replies), is_chat)


def _opened(turns: list[_Turn], opening: list[_Turn], history: Sequence[_Turn] = ()) -> list[_Turn]:
    """Return turns after a system message, if they have none of their own, and a history."""
    if turns and turns[0].role == "system":
        opening, turns = turns[:1], turns[1:]
    return [*opening, *history, *turns]


def _joined(row: Row, prompt: str, reply: str, *, more: str = "") -> tuple[list[_Turn], bool]:
    """Return the turns in two columns, and whether one of them holds messages.

    Args:
        more: text after that of the prompt, in a paragraph of its own; after messages, a turn.
    """
    asked, said = optional_column(row, prompt), optional_column(row, reply)
    if isinstance(asked, list | tuple):
        first = _turns(row, prompt) + ([_Turn("user", more)] if more else [])
    else:
        text = "\n\n".join(part for part in (_text(row, prompt), more) if part)
        first = [_Turn("user", text)]
    if not isinstance(said, list | tuple):
        return [*first, _Turn("assistant", _text(row, reply))], isinstance(asked, list | tuple)
    last = _turns(row, reply)
    asked_turns = first[:-1] if more and isinstance(asked, list | tuple) else first
    is_whole = asked is None and not more or last[: len(asked_turns)] == asked_turns
    if is_whole and more:
        raise ValueError(f"column {reply} holds the prompt too, so the input has no place in it")
    return last if is_whole else first + last, True


def _turns(row: Row, column: str) -> list[_Turn]:
    """Return the messages in a column: role and content, or from and value.

    A message of `weight: 0` is context and is not trained, as in OpenAI's files.
    """
    value = optional_column(row, column)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise wrong_value(value, "a list of messages", column)
    turns = []
    for number, message in enumerate(value, start=1):
        try:
            turns.append(_turn(message))
        except ValueError as error:
            raise ValueError(f"column {column}: message {number} {error}") from None
    return turns


def _turn(message: Any) -> _Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"is {message!r:.80}; give role and content")
    names = ("role", "content") if "role" in message else ("from", "value")
    missing = [name for name in names if message.get(name) is None]
    calls = [name for name in ("tool_calls", "function_call") if message.get(name)]
    if calls:
        raise ValueError(f"holds {calls[0]}, which is not supported; write calls as its content")
    if missing:
        raise ValueError(f"has no {' and no '.join(missing)}; it has {listed(message)}")
    role, content = (message[name] for name in names)
    if not isinstance(role, str) or not role.strip():
        raise ValueError(f"has the {names[0]} {role!r:.40}, which is not text")
    role = role.strip().casefold()
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"has the weight {weight!r:.40}; use 1, or 0 for context only")
    return _Turn(SPEAKERS.get(role, role), _content(content, names[1]), weight != 0)


def _content(content: Any, name: str) -> str:
    """Return the text of a message, also of a list of parts that are text."""
    if isinstance(content, list | tuple):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError(f"holds parts that are not text: {content!r:.80}")
        content = "".join(texts)
    return valid_text(content, said=f"has the {name}")


def _text(row: Row, column: str) -> str:
    """Return the text in a column, a number as text; empty where the cell is."""
    value = optional_column(row, column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        return ""
    return valid_text(value, said=f"column {column} holds")


def _history(row: Row, column: str) -> list[_Turn]:
    """Return earlier turns: pairs of texts, of the user and of the assistant."""
    value, turns = optional_column(row, column) or [], []
    for pair in value if isinstance(value, list | tuple) else [None]:
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise wrong_value(value, "a list of pairs of texts", column)
        asked, said = (valid_text(text, said=f"column {column} holds") for text in pair)
        turns += [_Turn("user", asked), _Turn("assistant", said)]
    return turns
