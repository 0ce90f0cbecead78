"""The examples of supervised training: rows as tokens, which are trained and which held out."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings, SftSettings
from agrpo_megatron.tasks.supervised.example import Example, row_digest
from agrpo_megatron.tasks.supervised.leaks import HeldOut, without_asked
from agrpo_megatron.tasks.supervised.pairs import compared_rows, read_pairs
from agrpo_megatron.tasks.supervised.sources import Source, read_source, sources
from agrpo_megatron.text.notes import text_notes
from agrpo_megatron.text.replies import Conversation, TokenRow, token_rows
from agrpo_megatron.text.tokenizer import Tokenizer
from agrpo_megatron.types import Chat


@dataclass(frozen=True, eq=False)
class Supervised:
    """The data of a supervised phase."""

    train: Sequence[Example]  # of all sources, one after the other
    shares: list[tuple[int, float]]  # examples and weight of each source
    epoch: float  # examples in one epoch of the mixture
    held_out: Sequence[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: dict[str, str] | None = None  # of raw texts, their digests by name; else None

    def digests(self) -> dict[str, str]:
        """Return digests of everything that is trained on or held out."""
        if self.texts is not None:
            return self.texts
        parts = {"supervised rows": self.train, "held-out supervised rows": self.held_out}
        found = {}
        for name, examples in parts.items():
            whole = hashlib.sha256(repr(self.shares).encode())
            for row in (row for example in examples for row in example.rows):
                whole.update(row.ids.tobytes() + row.trained.tobytes())
            found[name] = whole.hexdigest()
        return found


def read_supervised(
    sft: SftSettings,
    tokenizer: Tokenizer,
    *,
    model: ModelSettings,
    sampling: SamplingSettings,
    asked: Sequence[HeldOut] = (),
) -> Supervised:
    """Read `sft.data` and the held-out rows.

    Args:
        sft: with its padding.
        asked: held-out problems of the task, which rows of `sft.data` may not answer.

    Raises:
        ValueError: a source cannot be read, a row is too long or answers a held-out problem, or
            nothing is left to train.
    """
    limit = sft.row_tokens or model.max_sequence_length
    read = partial(_read, sft=sft, tokenizer=tokenizer, sampling=sampling, limit=limit)
    chosen, notes = sources(sft), list[str]()
    held_out = list[Example]()
    if sft.eval_data is not None:
        held = Source(sft.eval_data, columns=sft.columns, chat=sft.chat)
        held_out, said = read("sft.eval_data", held, split="test")
        notes += said
    found = {key: read(key, each, split="train", asked=asked) for key, each in chosen.items()}
    for examples, _ in found.values():  # of all sources, before any row of one is trained
        here = _chosen(examples, sft.eval_fraction)
        held_out += [example for example in examples if example.talk in here]
    taken = set[bytes]().union(*(example.digests for example in held_out))
    parts = list[list[Example]]()
    for key, (examples, said) in found.items():
        kept, name = [e for e in examples if e.digests.isdisjoint(taken)], chosen[key].data
        if left := len(examples) - len(kept):
            said.append(f"{key}={name}: {left:,} of {len(examples):,} examples are held out")
        if not kept:
            raise ValueError(f"{key}={name} leaves no row to train on: {'; '.join(said)}")
        notes += said
        parts.append(kept)
    pairs = list(zip(chosen.values(), parts, strict=True))
    shares = [(len(part), source.share(len(part))) for source, part in pairs]
    is_weighted = any(source.weight is not None for source, _ in pairs)
    epoch = sum(count if is_weighted else weight for count, weight in shares)
    train = list(itertools.chain(*parts))
    notes.append(_lengths(train, held_out))
    return Supervised(train, shares, epoch, held_out, notes)


def padded_length(
    row: TokenRow, padding: str | None, sampling: SamplingSettings, *, longest: int = 0
) -> int:
    """Return the tokens of a row and of its padding.

    Args:
        longest: tokens of the longest row of its batch, to which `padding=batch` fills it.
    """
    length, block = len(row.ids), sampling.block_length
    if padding == "batch":
        return max(length, longest)
    if padding == "completion":
        return max(length, row.prompt + sampling.completion_length)
    if padding == "block":
        start = 0 if sampling.block_origin == "row" else row.prompt
        return start + -(-(length - start) // block) * block
    return length


def _read(
    key: str,
    source: Source,
    *,
    split: str,
    sft: SftSettings,
    tokenizer: Tokenizer,
    sampling: SamplingSettings,
    limit: int,
    asked: Sequence[HeldOut] = (),
) -> tuple[list[Example], list[str]]:
    """Return the examples of a source, and notes on its rows.

    Raises:
        ValueError: as `read_supervised`.
    """
    said = f"{key}={source.data}"
    numbered, found, note = _tokens(key, source, split=split, sft=sft, tokenizer=tokenizer)
    leaked, leaks = without_asked(numbered, found, asked, said=said)
    pairs = zip(numbered, found, strict=True)
    read = [(number, talk, rows) for (number, talk), rows in pairs if number not in leaked]
    kept = [(Chat(talk.messages), rows[-1].ids.tolist()) for _, talk, rows in read if rows]
    chats, ids = [chat for chat, _ in kept], [ids for _, ids in kept]
    notes = [note, *leaks, *text_notes(tokenizer, chats, ids, what=f"rows of {source.data}")]
    if empty := len(read) - len(kept):
        why = "have no reply to train" if sft.loss == "denoising" else "have equal or empty answers"
        notes.append(f"{said}: {empty:,} of {len(read):,} rows {why}; left out")
    examples, long, longest = list[Example](), 0, 0
    for number, _, rows in read:
        lengths = [padded_length(row, sft.padding, sampling) for row in rows]
        longest = max(longest, *lengths, 0)
        fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
        long += len(fitting) < len(rows)
        name = f"{source.data}, row {number}"
        groups = _groups(rows, fitting, sft)
        examples += [Example(name, group, row_digest(rows[-1])) for group in groups]
    if long:
        over = f"{long:,} of {len(read):,} rows have over {limit} tokens, the longest {longest}"
        if sft.long_rows == "refuse":
            raise ValueError(
                f"{said}: {over}; leave them out by sft.long_rows=drop, or raise sft.row_tokens or "
                "model.max_sequence_length"
            )
        notes.append(f"{said}: {over}; left out (sft.long_rows=drop)")
    if not examples:
        raise ValueError(f"{said} leaves no row to train on: {'; '.join(notes)}")
    return examples, notes


def _tokens(
    key: str, source: Source, *, split: str, sft: SftSettings, tokenizer: Tokenizer
) -> tuple[list[tuple[int, Conversation]], list[list[TokenRow]], str]:
    """Return the numbered conversations and the token rows of a source, and a note on it.

    Of a pair, the conversation is the rejected one, whose tokens are the last.
    """
    said = f"{key}={source.data}"
    if sft.loss == "vrpo":
        pairs, note = read_pairs(
            source.data, key=key, split=split, columns=source.columns, as_chat=source.chat
        )
        found = compared_rows(tokenizer, pairs, key=said)
        return [(number, pair.rejected) for number, pair in pairs], found, note
    numbered, note = read_source(key, source, split=split)
    turns = "each" if sft.turns == "random" else sft.turns
    found = token_rows(tokenizer, numbered, turns=turns, key=said)
    return numbered, found, note


def _groups(
    rows: list[TokenRow], fitting: list[TokenRow], sft: SftSettings
) -> list[list[TokenRow]]:
    """Return the examples that a row gives: a pair only if both its texts fit."""
    if sft.loss == "vrpo":
        return [rows] if len(fitting) == len(rows) > 0 else []
    if sft.turns == "random":
        return [fitting] if fitting else []
    return [[row] for row in fitting]


def _chosen(examples: Sequence[Example], fraction: float) -> set[bytes]:
    """Return a share of the conversations, at least one, by their hashes; none for 0."""
    talks = sorted({example.name: example.talk for example in examples}.values())
    return set(talks[: max(1, round(fraction * len(talks)))] if fraction else ())


def _lengths(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    """Return a note on the number of examples and the lengths of their rows."""
    rows = [row for example in train for row in example.rows]
    whole, replies = [len(row.ids) for row in rows], [int(row.trained.sum()) for row in rows]
    return (
        f"supervised rows: {len(train):,} to train on, {len(held_out):,} held out; {min(whole)} to "
        f"{max(whole)} tokens, on average {sum(whole) / len(rows):.0f}, of which "
        f"{sum(replies) / len(rows):.0f} are trained"
    )
