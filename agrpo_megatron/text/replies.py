"""Supervised rows as tokens: conversations in the chat template, with a mark at trained tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from agrpo_megatron.text.chat import Template
from agrpo_megatron.text.tokenizer import Tokenizer
from agrpo_megatron.types import Chat, Message

TURNS = ("last", "each", "all")
PRIVATE = range(0xE000, 0xF8FF)  # characters without a meaning, to mark the end of a text


@dataclass(frozen=True)
class Conversation:
    """A row of supervised data: its messages, of which some replies are trained."""

    messages: tuple[Message, ...]
    replies: tuple[int, ...]  # places of the assistant's messages that are trained, in order
    is_chat: bool = True  # False: a text and its continuation, without the chat template


@dataclass(frozen=True, eq=False)
class TokenRow:
    """A conversation up to the end of its last trained reply.

    The tokens before the first trained one are the prompt, token by token as the sampler gets it.
    Trained are the replies and the token that ends each: the template's, or else end-of-text.
    """

    ids: numpy.ndarray  # [L] int32
    trained: numpy.ndarray  # [L] bool; at least one is

    @property
    def prompt(self) -> int:
        """Return the number of tokens before the first trained one."""
        return int(self.trained.argmax())


def token_rows(
    tokenizer: Tokenizer, numbered: Iterable[tuple[int, Conversation]], *, turns: str, key: str
) -> list[list[TokenRow]]:
    """Return the rows of each conversation; none of one without replies.

    Args:
        numbered: conversations with their row numbers.
        turns: last: a row of the last reply; each: one row per reply, with what is before it; all:
            one row in which all replies are trained.
        key: the setting of the source, for errors.

    Raises:
        ValueError: the chat template refuses or rewrites a conversation; names the row.
    """
    pieces: list[list[list[_Piece]]] = []
    for number, conversation in numbered:
        try:
            groups = _groups(conversation.replies, turns)
            pieces.append([_pieces(tokenizer.render, conversation, group) for group in groups])
        except ValueError as error:
            raise ValueError(f"{key}, row {number}: {error}") from None
    texts = [text for rows in pieces for row in rows for piece in row for text in piece]
    ids = iter(tokenizer.encode_prompts(texts))
    return [
        [_token_row([(next(ids), next(ids), next(ids)) for _ in row], tokenizer) for row in rows]
        for rows in pieces
    ]


class _Piece(NamedTuple):
    """A reply and its surroundings; a row is a list of them."""

    before: str
    reply: str
    after: str  # it begins with the template's closing token, if the template writes one


def _groups(replies: Sequence[int], turns: str) -> list[Sequence[int]]:
    """Return the replies that are trained in each row."""
    if turns == "all":
        return [replies] if replies else []
    return [[place] for place in (replies if turns == "each" else replies[-1:])]


def _pieces(render: Template, conversation: Conversation, places: Sequence[int]) -> list[_Piece]:
    """Return the text of a row that trains the replies at `places`."""
    messages = conversation.messages
    if not conversation.is_chat:
        asked, said = messages
        return [_Piece(asked.content, said.content, "")]
    shown = messages[: places[-1] + 1]
    openings = [render(Chat(messages[:place])) for place in places]
    whole, ends = _ends(render, Chat(shown), places)
    starts = []
    for place, opening, end in zip(places, openings, ends, strict=True):
        said = messages[place].content.strip()
        is_opened = whole.startswith(opening)
        if not is_opened and (len(places) > 1 or not whole[:end].endswith(said)):
            raise _rewritten(said)
        # If not, the template opens a reply in another way than it writes a finished one.
        starts.append(len(opening) if is_opened else end - len(said))
        if not _letters(whole[starts[-1] : end]).endswith(_letters(said)):
            raise _rewritten(said)
    stops = [*starts[1:], len(whole)]
    spans = zip(starts, ends, stops, strict=True)
    before = [openings[0], *[""] * (len(places) - 1)]
    return [
        _Piece(text, whole[start:end], whole[end:stop])
        for text, (start, end, stop) in zip(before, spans, strict=True)
    ]


def _ends(render: Template, chat: Chat, places: Sequence[int]) -> tuple[str, list[int]]:
    """Return a chat in the template, and where the texts of the messages at `places` end."""
    whole = render(chat)
    mark = next(c for c in map(chr, PRIVATE) if c not in whole)
    for strip in (str, str.strip):  # some templates keep the white space around a text
        messages = list(chat.messages)
        for place in places:
            content = strip(messages[place].content) + mark
            messages[place] = messages[place]._replace(content=content)
        marked = render(Chat(tuple(messages))).split(mark)
        if "".join(marked) == whole and len(marked) == len(places) + 1:
            lengths = [len(part) for part in marked[:-1]]
            return whole, [sum(lengths[: n + 1]) for n in range(len(lengths))]
    raise _rewritten(chat.messages[places[-1]].content)


def _letters(text: str) -> str:
    return "".join(text.split())


def _rewritten(text: str) -> ValueError:
    return ValueError(
        f"the chat template rewrites the assistant's text {text!r:.60}; train only the last "
        "turn if that is an earlier one, or use another tokenizer.chat_template"
    )


def _token_row(
    pieces: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]], tokenizer: Tokenizer
) -> TokenRow:
    """Join the ids of pieces; a row ends with the token that ends its last reply."""
    ids, trained = list[int](), list[bool]()
    for number, (before, reply, after) in enumerate(pieces, start=1):
        stop = next((n for n, token in enumerate(after, 1) if token in tokenizer.stop_ids), 0)
        is_last = number == len(pieces)
        if is_last:
            after = after[:stop] if stop else [tokenizer.eos_id]
            stop = len(after)
        ids += [*before, *reply, *after]
        trained += [False] * len(before) + [True] * (len(reply) + stop)
        trained += [False] * (len(after) - stop)
    return TokenRow(numpy.array(ids, numpy.int32), numpy.array(trained, numpy.bool_))
