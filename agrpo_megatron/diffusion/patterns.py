"""Attention patterns of packed rows: which tokens of a row see which.

A row is a sequence of spans. Its first span is the context. A token of the context sees the blocks
of the context up to its own. A token of a copy (a partially masked state of some blocks) sees the
context before its block, and its own block of the copy; one inside the context also sees what
follows its block there. So six patterns are six rows:

    full            one span that is one block
    ahead           one span, each of whose tokens sees a number of those after it
    block_causal    one span of several blocks
    causal_context  a context of blocks of one token, and a copy of the open block
    replay          a context, and copies of its blocks; their positions repeat those of the context
    inside          a context that is one block, and copies of a part of it that see the rest

`visible` is the definition; every execution of attention equals it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agrpo_megatron.types import Row, Span

NEVER = 2**40  # a position that no row has


class Places(NamedTuple):
    """What attention needs to know of each token, [T] int64 each."""

    row: Tensor  # number of its packed row
    span: Tensor  # number of its span in its row; 0: the context
    position: Tensor
    first: Tensor  # first position of its block
    end: Tensor  # position after its block
    after: Tensor  # position from which it sees the context again


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


def inside(length: int, part: tuple[int, int], copies: int) -> Row:
    """Return a context whose tokens all see each other, and copies of a part of it.

    Args:
        length: tokens of the context.
        part: its first position, and the position after its last.
    """
    start, end = part
    copy = Span(end - start, start, is_copy=True, is_inside=True)
    return (Span(length), *[copy] * copies)


def row_length(row: Row) -> int:
    """Return the tokens of a row."""
    return sum(span.length for span in row)


@functools.lru_cache(maxsize=1024)
def visible_pairs(row: Row) -> int:
    """Return how many pairs of tokens of a row see each other."""
    total, begin = 0, 0
    for span in row:
        length, start, is_copy = span.length, span.start, span.is_copy
        _, _, first, end, after = _table(row)[:, begin : begin + length]
        seen = end.clamp(max=start + length) - first.clamp(min=start) * is_copy
        seen = seen + (row[0].length - after).clamp(min=0)
        total += int((seen + first.clamp(max=row[0].length) * is_copy).sum())
        begin += length
    return total


def visible(places: Places, query: Tensor, key: Tensor) -> Tensor:
    """Return whether tokens `query` see tokens `key`: indices of the same or broadcast shapes."""
    position, is_context = places.position[key], places.span[key] == 0
    same = places.span[query] == places.span[key]
    own = same & (places.first[query] <= position)
    before = own | (is_context & (same | (position < places.first[query])))
    later = is_context & (position >= places.after[query])
    return (places.row[query] == places.row[key]) & (
        (before & (position < places.end[query])) | later
    )


def places_of(
    rows: Sequence[Row],
    device: torch.device,
    *,
    before: Sequence[int] | None = None,
    after: Sequence[int] | None = None,
) -> Places:
    """Return the places of the tokens of packed rows.

    Args:
        before: tokens of each row that are left out, its first ones; None: none.
        after: its last ones.
    """
    none = [0] * len(rows)
    parts = [
        _table(row)[:, first : row_length(row) - last]
        for row, first, last in zip(rows, before or none, after or none, strict=True)
    ]
    lengths = torch.tensor([part.shape[1] for part in parts])
    numbers = torch.arange(len(rows)).repeat_interleave(lengths)
    table = torch.cat([numbers[None], torch.cat(parts, 1)])
    if device.type == "cuda":
        table = table.pin_memory()
    return Places(*table.to(device, non_blocking=True))


@functools.lru_cache(maxsize=256)
def span_mask(row: Row, number: int, device: torch.device) -> Tensor | None:
    """Return which of `span_keys` the tokens of a span see, [tokens, keys]; None: all of them.

    Args:
        number: of the span.
    """
    places, tokens = places_of([row], torch.device("cpu")), torch.arange(row_length(row))
    key = torch.cat([tokens[part] for part in span_keys(row, number)])
    mask = visible(places, tokens[span_slice(row, number), None], key[None])
    return None if bool(mask.all()) else mask.to(device)


@functools.lru_cache(maxsize=256)
def part_mask(row: Row, part: slice, device: torch.device) -> Tensor | None:
    """Return which tokens of a row a part of it sees, [part, row]; None: all of them."""
    places, tokens = places_of([row], torch.device("cpu")), torch.arange(row_length(row))
    mask = visible(places, tokens[part, None], tokens[None])
    return None if bool(mask.all()) else mask.to(device)


def span_keys(row: Row, number: int) -> list[slice]:
    """Return the tokens that those of a span may see: of the context, and of the span itself.

    They are in the order of their positions, as in a cached rollout, which sums over them alike.
    """
    own, span, context = span_slice(row, number), row[number], row[0].length
    if span.is_inside:
        return [slice(span.start), own, slice(span.start + span.length, context)]
    return [slice(context), own] if number else [own]


def span_slice(row: Row, number: int) -> slice:
    """Return the tokens of a span in its row."""
    start = sum(span.length for span in row[:number])
    return slice(start, start + row[number].length)


@functools.lru_cache(maxsize=1024)
def _table(row: Row) -> Tensor:
    """Return span, position, first, end and after of a row's tokens, [5, tokens] on the CPU."""
    parts = []
    for number, (length, start, block, _, origin, more, is_inside) in enumerate(row):
        position = torch.arange(start, start + length)
        if block is None:
            first, end = torch.full_like(position, start), torch.full_like(position, start + length)
            if more is not None:
                end = (position + 1 + more).clamp(max=start + length)
        else:
            first = origin + (position - origin).div(block, rounding_mode="floor") * block
            end = first + block
        after = end if is_inside else torch.full_like(position, NEVER)
        parts.append(torch.stack([torch.full_like(position, number), position, first, end, after]))
    return torch.cat(parts, 1)
