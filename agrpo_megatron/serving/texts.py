"""Texts of completions: where they end, which part of them is settled, and how long they are."""

from collections.abc import Sequence
from dataclasses import dataclass

from agrpo_megatron.text.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # decoded from a part of a character's bytes


@dataclass(frozen=True)
class Completion:
    """A finished completion."""

    text: str
    tokens: int  # written, at most those asked for
    reason: str  # stop: end-of-text or a stop text; length: neither came


def stop_in(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first of the stop texts begins in a text, or None."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=None)


def completion(
    tokenizer: Tokenizer, ids: Sequence[int], *, most: int, stops: Sequence[str]
) -> Completion:
    """Return the text of sampled ids, which may be more than were asked for.

    Args:
        most: tokens that were asked for.
        stops: the text ends before the first of these.
    """
    ids = list(ids[:most])
    length = next((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), None)
    text = tokenizer.decode(ids)
    end = stop_in(text, stops)
    if end is None:
        reason = "length" if length is None else "stop"
        return Completion(text, len(ids) if length is None else length, reason)
    needed = range(1, len(ids) + 1)  # tokens until the stop text is whole
    whole = next(n for n in needed if stop_in(tokenizer.decode(ids[:n]), stops) is not None)
    return Completion(text[:end], whole, "stop")


def settled(tokenizer: Tokenizer, ids: Sequence[int], *, most: int, stops: Sequence[str]) -> str:
    """Return the text of a completion's beginning that later tokens cannot change.

    Held back: a character whose bytes are incomplete, and what may be the start of a stop text.
    """
    text = tokenizer.decode(ids[:most])
    end = stop_in(text, stops)
    if end is not None:
        return text[:end]
    text = text.rstrip(INCOMPLETE)
    starts = (
        size
        for stop in stops
        for size in range(min(len(stop) - 1, len(text)), 0, -1)
        if text.endswith(stop[:size])
    )
    return text[: len(text) - max(starts, default=0)]
