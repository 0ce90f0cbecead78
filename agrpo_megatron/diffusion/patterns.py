"""Attention patterns of packed rows: which tokens of a row see which.

A row is a sequence of spans. Its first span is the context. A token of the context sees the blocks
of the context up to its own. A token of a copy (a partially masked state of some blocks) sees the
context before its block, and its own block of the copy. So five patterns are five rows:

    full            one span that is one block
    ahead           one span, each of whose tokens sees a number of those after it
    block_causal    one span of several blocks
    causal_context  a context of blocks of one token, and a copy of the open block
    replay          a context, and copies of its blocks; their positions repeat those of the context

`visible` is the definition; every execution of attention equals it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agrpo_megatron.types import Row, Span


class Places(NamedTuple):
    """What attention needs to know of each token, [T] int64 each."""

    row: Tensor  # number of its packed row
    span: Tensor  # number of its span in its row; 0: the context
    position: Tensor
    first: Tensor  # first position of its block
    end: Tensor  # position after its block


def full(length: int) -> Row:
    """Return a row whose tokens all see each other."""
    return (Span(length),)


def ahead(length: int, share: float) -> Row:
    """Return a row whose tokens see those before them, and a share of the most after them.

    Args:
        share: of `length` - 1 tokens; 0: the row is causal, 1: it is full.
    """
    return (Span(length, ahead=round(share * (length - 1))),)


def block_causal(length: int, block: int, *, origin: int = 0) -> Row:
    """Return a row whose tokens see earlier blocks and their own."""
    return (Span(length, block=block, origin=origin),)


def replay(
    length: int, block: int, copies: Sequence[tuple[int, int]], *, causal: bool, origin: int = 0
) -> Row:
    """Return a context and copies of parts of it.

    Args:
        length: tokens of the context.
        copies: first position and length of each; a copy may reach beyond the context.
        causal: whether the tokens of the context see only those before them.
    """
    context = Span(length, block=1 if causal else block, origin=origin)
    return (context, *(Span(count, start, block, True, origin) for start, count in copies))


def row_length(row: Row) -> int:
    """Return the tokens of a row."""
    return sum(span.length for span in row)


@functools.lru_cache(maxsize=1024)
def visible_pairs(row: Row) -> int:
    """Return how many pairs of tokens of a row see each other."""
    total, begin = 0, 0
    for length, start, _, is_copy, _, _ in row:
        _, _, first, end = _table(row)[:, begin : begin + length]
        seen = end.clamp(max=start + length) - first.clamp(min=start) * is_copy
        total += int((seen + first.clamp(max=row[0].length) * is_copy).sum())
        begin += length
    return total


def visible(places: Places, query: Tensor, key: Tensor) -> Tensor:
    """Return whether tokens `query` see tokens `key`: indices of the same or broadcast shapes."""
    position, is_context = places.position[key], places.span[key] == 0
    same = places.span[query] == places.span[key]
    own = same & (places.first[query] <= position)
    return (
        (places.row[query] == places.row[key])
        & (position < places.end[query])
        & (own | (is_context & (same | (position < places.first[query]))))
    )


def places_of(
    rows: Sequence[Row], device: torch.device, *, before: Sequence[int] | None = None
) -> Places:
    """Return the places of the tokens of packed rows.

    Args:
        before: tokens of each row that are left out, its first ones; None: none.
    """
    parts = [
        _table(row)[:, first:] for row, first in zip(rows, before or [0] * len(rows), strict=True)
    ]
    lengths = torch.tensor([part.shape[1] for part in parts])
    numbers = torch.arange(len(rows)).repeat_interleave(lengths)
    table = torch.cat([numbers[None], torch.cat(parts, 1)])
    if device.type == "cuda":
        table = table.pin_memory()
    return Places(*table.to(device, non_blocking=True))


@functools.lru_cache(maxsize=256)
def span_mask(row: Row, number: int, device: torch.device) -> Tensor | None:
    """Return which keys the tokens of a span see, [tokens, keys] bool; None: all of them.

    Keys are the tokens of the context, and for a copy those of the copy after them.

    Args:
        number: of the span.
    """
    places, (context, own) = places_of([row], torch.device("cpu")), span_slices(row, number)
    tokens = torch.arange(own.stop)
    key = torch.cat([tokens[context], tokens[own]]) if number else tokens
    mask = visible(places, tokens[own, None], key[None])
    return None if bool(mask.all()) else mask.to(device)


@functools.lru_cache(maxsize=256)
def tail_mask(row: Row, before: int, device: torch.device) -> Tensor | None:
    """Return which tokens of a row its tokens from `before` on see, [tokens, row]; None: all."""
    places, tokens = places_of([row], torch.device("cpu")), torch.arange(row_length(row))
    mask = visible(places, tokens[before:, None], tokens[None])
    return None if bool(mask.all()) else mask.to(device)


def span_slices(row: Row, number: int) -> tuple[slice, slice]:
    """Return the tokens of a row's context, and of one of its spans."""
    start = sum(span.length for span in row[:number])
    return slice(row[0].length), slice(start, start + row[number].length)


@functools.lru_cache(maxsize=1024)
def _table(row: Row) -> Tensor:
    """Return span, position, first and end of a row's tokens, [4, tokens] on the CPU."""
    parts = []
    for number, (length, start, block, _, origin, more) in enumerate(row):
        position = torch.arange(start, start + length)
        if block is None:
            first, end = torch.full_like(position, start), torch.full_like(position, start + length)
            if more is not None:
                end = (position + 1 + more).clamp(max=start + length)
        else:
            first = origin + (position - origin).div(block, rounding_mode="floor") * block
            end = first + block
        parts.append(torch.stack([torch.full_like(position, number), position, first, end]))
    return torch.cat(parts, 1)
