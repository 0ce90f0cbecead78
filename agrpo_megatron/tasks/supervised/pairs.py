"""Rows of preference data as pairs of conversations, in the shapes that trl reads."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from os.path import commonprefix
from typing import NamedTuple

from agrpo_megatron.tasks.data import (
    Row,
    check_roles,
    has_column,
    listed,
    optional_column,
)
from agrpo_megatron.tasks.supervised.columns import PROMPTS
from agrpo_megatron.tasks.supervised.rows import Found, join_reply, read_shaped
from agrpo_megatron.text.replies import Conversation, TokenRow, token_rows
from agrpo_megatron.text.tokenizer import Tokenizer

ROLES = ("prompt", "chosen", "rejected")  # keys of `columns`


class Pair(NamedTuple):
    """Two conversations with one beginning, of which what follows is compared."""

    chosen: Conversation
    rejected: Conversation

    @property
    def is_useful(self) -> bool:
        """Return whether both have a reply after the beginning, so that they differ."""
        return bool(self.chosen.replies and self.rejected.replies)


def read_pairs(
    source: str,
    *,
    key: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    as_chat: bool | None = None,
) -> tuple[list[tuple[int, Pair]], str]:
    """Return the numbered pairs of a file or data set, and a note on how it was read.

    Args:
        source, split: as `read_rows` has them.
        key: the setting of the source, for errors.
        columns: columns by role (see `ROLES`) where the user names them.
        as_chat: two texts go through the chat template; None: only messages do.

    Raises:
        ValueError: the source cannot be read, or a row holds something else; names row and column.
    """

    def find(names: Iterable[str], section: str) -> Found[Pair]:
        found = _columns(names, columns or {}, key=section)
        begins = found.get("prompt", "a common beginning")
        said = f"pairs read as {found['chosen']} against {found['rejected']} after {begins}"
        make = partial(to_pair, columns=found, as_chat=bool(as_chat))
        return Found(make, set(found.values()), said, lambda pair: pair.chosen.is_chat)

    return read_shaped(source, find, key=key, split=split)


def compared_rows(
    tokenizer: Tokenizer, numbered: Iterable[tuple[int, Pair]], *, key: str
) -> list[list[TokenRow]]:
    """Return the chosen and the rejected text of each pair as tokens; none of a useless one.

    Raises:
        ValueError: the chat template refuses or rewrites a conversation; names the row.
    """
    pairs = [(number, pair if pair.is_useful else None) for number, pair in numbered]
    sides = [
        token_rows(
            tokenizer,
            [(number, pair[side]) for number, pair in pairs if pair is not None],
            turns="all",
            key=key,
        )
        for side in (0, 1)
    ]
    found = ([*chosen, *rejected] for chosen, rejected in zip(*sides, strict=True))
    return [[] if pair is None else next(found) for _, pair in pairs]


def to_pair(row: Row, columns: Mapping[str, str], *, as_chat: bool = False) -> Pair:
    """Return the two conversations of a row; replies that both share are not compared.

    Without a prompt, what both have in common is the prompt: their first messages, or the first
    characters of two texts (without a space at its end), as trl splits them.

    Raises:
        KeyError: a column is missing.
        ValueError: a column holds something else; names the column.
    """
    for column in columns.values():
        if not has_column(row, column):
            raise KeyError(column)
    names = columns["chosen"], columns["rejected"]
    prompt, texts = columns.get("prompt", "prompt"), [optional_column(row, name) for name in names]
    if "prompt" not in columns and all(isinstance(text, str) for text in texts):
        start = commonprefix(texts)
        start = start.removesuffix(" ")
        row = {name: text[len(start) :] for name, text in zip(names, texts, strict=True)}
        row[prompt] = start
    chosen, rejected = (join_reply(row, prompt, name, as_chat=as_chat) for name in names)
    shared = len(commonprefix([list(chosen.messages), list(rejected.messages)]))
    return Pair(*(_after(shared, conversation) for conversation in (chosen, rejected)))


def _after(shared: int, conversation: Conversation) -> Conversation:
    """Return a conversation whose replies before a place are not trained."""
    replies = tuple(place for place in conversation.replies if place >= shared)
    return replace(conversation, replies=replies)


def _columns(names: Iterable[str], chosen: Mapping[str, str], *, key: str) -> dict[str, str]:
    """Return the columns by role, in small letters; without a prompt where there is none.

    Raises:
        ValueError: a role is unknown, or a column is not there.
    """
    row = dict.fromkeys(names)
    check_roles(chosen, ROLES, row, key=key)
    found = {role: chosen.get(role, role).casefold() for role in ROLES}
    prompts = [name for name in PROMPTS if has_column(row, name)]
    if "prompt" not in chosen:
        found["prompt"] = prompts[0] if prompts else ""
    missing = [column for column in found.values() if column and not has_column(row, column)]
    if missing:
        raise ValueError(
            f"sft.loss=vrpo needs the columns chosen and rejected, and there is no {missing[0]}; "
            f"the columns are {listed(row)}; name them, as {key}={{chosen: best, rejected: worst}}"
        )
    return {role: column for role, column in found.items() if column}
