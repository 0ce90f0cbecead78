"""Raw texts as rows to learn from: each is read once, its ids are kept in a file of the run.

All texts of a source follow one another, each with an end-of-text, and are cut into rows of equal
length. Rows are read from the file when they are needed: memory does not grow with the texts. A row
depends on the texts and its number alone, so a resumed run and any layout learn the same rows.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy

from agrpo_megatron.config.settings import ModelSettings, SftSettings
from agrpo_megatron.tasks.supervised.example import Example
from agrpo_megatron.tasks.supervised.examples import Supervised
from agrpo_megatron.tasks.supervised.sources import sources
from agrpo_megatron.tasks.supervised.text_files import COLUMN, text_files, texts_of
from agrpo_megatron.tasks.supervised.text_ids import (
    TOKENS,
    Index,
    ids_key,
    ids_of,
    tokenizer_digest,
)
from agrpo_megatron.text.replies import TokenRow
from agrpo_megatron.text.tokenizer import Tokenizer


class _Rows(Sequence[Example]):
    """Rows that are read one at a time."""

    def _row(self, number: int) -> Example:
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        """Return a row, or some rows."""
        if isinstance(place, slice):
            return [self._row(number) for number in range(*place.indices(len(self)))]
        return self._row(range(len(self))[place])


class TextRows(_Rows):
    """The rows of a source, as examples that are read when they are needed.

    Args:
        end: the id after which a text begins that sees none of those before; None: all tokens of a
            row see each other.
    """

    def __init__(self, file: Path, index: Index, *, name: str, length: int, end: int | None):
        self.held, self._name, self._length, self._end = index, name, length, end
        self._tokens = numpy.memmap(file, numpy.int32, mode="r", shape=(index.tokens,))

    def __len__(self) -> int:
        whole, rest = divmod(self.held.tokens, self._length)
        return whole + (rest > 1)  # a row has a first token, and one to learn

    def _row(self, number: int) -> Example:
        """Return a row, of which all tokens that see another are trained, except the first."""
        ids = numpy.array(self._tokens[number * self._length : (number + 1) * self._length])
        trained = numpy.arange(len(ids)) > 0
        if self._end is not None:
            trained[1:] &= ids[:-1] != self._end
        return Example(f"{self._name}, row {number + 1}", [TokenRow(ids, trained)], b"")


class Joined(_Rows):
    """The rows of several sources, one after the other."""

    def __init__(self, parts: Sequence[TextRows]):
        self._parts = parts
        self._starts = [0, *itertools.accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def _row(self, number: int) -> Example:
        part = next(n for n, start in enumerate(self._starts[1:]) if number < start)
        return self._parts[part][number - self._starts[part]]


def open_texts(
    source: str,
    folder: Path,
    *,
    key: str,
    tokenizer: Tokenizer,
    digest: str,
    columns: Mapping[str, Any],
    length: int,
    end: int | None,
) -> tuple[TextRows, list[str]]:
    """Return the rows of a file or a folder of texts, and notes on them.

    The first rank of a job writes their ids, and the others wait for it.

    Args:
        folder: for the ids; those of the same files and tokenizer are used again.
        key: the setting of the source, for errors.
        digest: of the tokenizer.
        columns: the column of the texts by its role, `text`, where it has another name.
        length: tokens of a row.
        end: as `TextRows`.

    Raises:
        ValueError: a file cannot be read, a text is none, or there are no texts.
        RuntimeError: the first rank writes nothing.
    """
    column, said = columns.get(COLUMN, COLUMN), f"{key}={source}"
    files, notes = text_files(source, key=key)
    texts, wanted = texts_of(files, column, key=key), ids_key(files, column, digest)
    found = ids_of(texts, folder, key=wanted, tokenizer=tokenizer, said=said)
    rows = TextRows(folder / TOKENS, found, name=source, length=length, end=end)
    if not len(rows):
        raise ValueError(f"{said} holds {found.tokens} tokens, and a row needs two")
    return rows, [*notes, *_notes(source, rows, length)]


def read_texts(
    sft: SftSettings, tokenizer: Tokenizer, *, model: ModelSettings, folder: Path
) -> Supervised:
    """Read the raw texts of `sft.data` and `sft.eval_data`.

    Args:
        folder: for their ids.

    Raises:
        ValueError: as `open_texts`.
    """
    length, chosen = sft.row_tokens or model.max_sequence_length, sources(sft)
    given: dict[str, Any] = {"tokenizer": tokenizer, "digest": tokenizer_digest(tokenizer)}
    given |= {"length": length, "end": tokenizer.eos_id if sft.document_mask else None}
    parts, notes = list[TextRows](), list[str]()
    for number, (key, source) in enumerate(chosen.items()):
        columns, place = source.columns or {}, folder / str(number)
        rows, said = open_texts(source.data, place, key=key, columns=columns, **given)
        parts.append(rows)
        notes += said
    pairs = list(zip(chosen.values(), parts, strict=True))
    shares = [(len(part), source.share(len(part))) for source, part in pairs]
    held_out: Sequence[Example] = []
    digests: dict[str, Any] = {"texts": ([part.held.digest for part in parts], shares)}
    if sft.eval_data is not None:
        held = {"key": "sft.eval_data", "columns": sft.columns, **given}
        held_out, said = open_texts(sft.eval_data, folder / "held_out", **held)
        digests["held-out texts"] = held_out.held.digest
        notes += [f"held out: {note}" for note in said]
    is_weighted = any(source.weight is not None for source, _ in pairs)
    return Supervised(
        Joined(parts),
        shares,
        sum(count if is_weighted else weight for count, weight in shares),
        held_out,
        notes,
        {name: hashlib.sha256(repr(each).encode()).hexdigest() for name, each in digests.items()},
    )


def _notes(source: str, rows: TextRows, length: int) -> list[str]:
    """Return notes on the rows of a source, and on texts that the model reads otherwise."""
    held = rows.held
    notes = [
        f"{source}: {held.texts:,} texts of {held.tokens:,} tokens, ends included, are "
        f"{len(rows):,} rows of {length} tokens"
    ]
    of = f"of {held.texts:,} texts of {source} hold"
    if held.unknown:
        notes.append(f"{held.unknown:,} {of} text that the tokenizer lacks")
    if held.control:
        notes.append(f"{held.control:,} {of} control tokens such as {held.named}")
    return notes
