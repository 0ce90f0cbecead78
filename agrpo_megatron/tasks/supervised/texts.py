"""Raw texts as rows to learn from: each is read once, its ids are kept in a file of the run.

All texts of a source follow one another, each with an end-of-text, and are cut into rows of equal
length. Rows are read from the file when they are needed: memory does not grow with the texts. A row
depends on the texts and its number alone, so a resumed run and any layout learn the same rows.
"""

import gzip
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy

from agrpo_megatron.config.settings import ModelSettings, SftSettings
from agrpo_megatron.tasks.data import one_line
from agrpo_megatron.tasks.row_sources import NO_PACKAGE
from agrpo_megatron.tasks.supervised.example import Example
from agrpo_megatron.tasks.supervised.examples import Supervised
from agrpo_megatron.tasks.supervised.sources import sources
from agrpo_megatron.text.replies import TokenRow
from agrpo_megatron.text.tokenizer import Tokenizer

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
COLUMN = "text"
BATCH = 256  # texts that are tokenized in one call
TOKENS, INDEX = "tokens.bin", "index.json"
WAIT = 0.2  # seconds between two looks for the file that the first rank writes


@dataclass(frozen=True)
class Index:
    """What a file of ids holds."""

    key: str  # of the texts' files and the tokenizer
    texts: int
    tokens: int
    digest: str  # of the ids


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
    """The rows of a source, as examples that are read when they are needed."""

    def __init__(self, file: Path, index: Index, *, name: str, length: int):
        self.held, self._name, self._length = index, name, length
        self._tokens = numpy.memmap(file, numpy.int32, mode="r", shape=(index.tokens,))

    def __len__(self) -> int:
        whole, rest = divmod(self.held.tokens, self._length)
        return whole + (rest > 1)  # a row has a first token, and one to learn

    def _row(self, number: int) -> Example:
        """Return a row, of which all but the first token are trained."""
        ids = numpy.array(self._tokens[number * self._length : (number + 1) * self._length])
        trained = numpy.arange(len(ids)) > 0
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
    columns: Mapping[str, Any],
    length: int,
) -> TextRows:
    """Return the rows of a file or a folder of texts.

    The first rank of a job writes their ids, and the others wait for it.

    Args:
        folder: for the ids; those of the same files and tokenizer are used again.
        key: the setting of the source, for errors.
        columns: the column of the texts by its role, `text`, where it has another name.
        length: tokens of a row.

    Raises:
        ValueError: a file cannot be read, a text is none, or there are no texts.
    """
    column, files = columns.get(COLUMN, COLUMN), _files(source, key=key)
    wanted = _key(files, column, tokenizer)
    found = _read_index(folder, wanted)
    if found is None and os.environ.get("RANK", "0") == "0":
        texts = _texts(files, column, key=key)
        found = _write(folder, wanted, texts, tokenizer, said=f"{key}={source}")
    while found is None:
        time.sleep(WAIT)
        found = _read_index(folder, wanted)
    rows = TextRows(folder / TOKENS, found, name=source, length=length)
    if not len(rows):
        raise ValueError(f"{key}={source} holds {found.tokens} tokens, and a row needs two")
    return rows


def _files(source: str, *, key: str) -> list[Path]:
    """Return the files of a source, sorted by name."""
    path = Path(source)
    found = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    files = [file for file in found if file.name.lower().endswith(ENDINGS)]
    if not files:
        raise ValueError(
            f"{key}={source} names no texts; give a {', '.join(ENDINGS)} file, or a folder of them"
        )
    return files


def _key(files: Sequence[Path], column: str, tokenizer: Tokenizer) -> str:
    """Return what the ids depend on, without where the files are."""
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    pieces = [tokenizer.to_piece(number) for number in range(tokenizer.vocab_size)]
    return hashlib.sha256(
        json.dumps([stats, column, tokenizer.eos_id, pieces]).encode()
    ).hexdigest()


def _read_index(folder: Path, key: str) -> Index | None:
    """Return what the folder's file of ids holds; None if it is missing, or of other texts."""
    try:
        found = Index(**json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.key == key else None


def _write(
    folder: Path, key: str, texts: Iterator[str], tokenizer: Tokenizer, *, said: str
) -> Index:
    """Write the ids of texts, and what they are; the index comes last, so a kill leaves none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    partial = folder / f".{TOKENS}.{os.getpid()}"
    count = tokens = 0
    digest = hashlib.sha256()
    with partial.open("wb") as file:
        for batch in itertools.batched(texts, BATCH):
            try:
                encoded = tokenizer.encode_prompts(list(batch))
            except ValueError as error:
                raise ValueError(f"{said}: {error}") from None
            for ids in encoded:
                line = numpy.array([*ids, tokenizer.eos_id], "<i4").tobytes()
                file.write(line)
                digest.update(line)
                count, tokens = count + 1, tokens + len(ids) + 1
    if not tokens:
        raise ValueError(f"{said} holds no texts")
    partial.rename(folder / TOKENS)
    index = Index(key, count, tokens, digest.hexdigest())
    named = folder / f".{INDEX}.{os.getpid()}"
    named.write_text(json.dumps(asdict(index)), encoding="utf-8")
    named.rename(folder / INDEX)
    return index


def _texts(files: Sequence[Path], column: str, *, key: str) -> Iterator[str]:
    """Yield the texts of files that are not empty.

    Raises:
        ValueError: a file cannot be read, or has something else in the column.
    """
    for file in files:
        try:
            yield from filter(None, map(_text, itertools.count(1), _column(file, column)))
        except KeyError:
            fix = "name the column of the texts by sft.columns={text: NAME}"
            raise ValueError(f"{key}: {file} has no column {column}; {fix}") from None
        except Exception as error:  # of the system, the archive, the format, its library
            raise ValueError(f"{key}: {file} cannot be read ({one_line(error)})") from None


def _text(place: int, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"row {place} has a {type(value).__name__}, not a text")
    return value


def _column(file: Path, column: str) -> Iterator[Any]:
    """Yield the values of a column; a .txt file is one text."""
    name = file.name.lower()
    if name.endswith(".txt"):
        yield file.read_text(encoding="utf-8")
    elif name.endswith(".parquet"):
        yield from _parquet(file, column)
    else:
        read = gzip.open if name.endswith(".gz") else open
        with read(file, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)[column] for line in lines if line.strip())


def _parquet(file: Path, column: str) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"the package pyarrow {NO_PACKAGE}") from None
    opened = parquet.ParquetFile(file)
    if column not in opened.schema_arrow.names:
        raise KeyError(column)
    for batch in opened.iter_batches(BATCH, columns=[column]):
        yield from batch.column(0).to_pylist()


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
    given: dict[str, Any] = {"tokenizer": tokenizer, "length": length}
    parts, notes = list[TextRows](), list[str]()
    for number, (key, source) in enumerate(chosen.items()):
        columns, place = source.columns or {}, folder / str(number)
        rows = open_texts(source.data, place, key=key, columns=columns, **given)
        parts.append(rows)
        notes.append(_note(source.data, rows, length))
    held_out: Sequence[Example] = []
    digests = {"texts": [part.held.digest for part in parts]}
    if sft.eval_data is not None:
        held = {"key": "sft.eval_data", "columns": sft.columns, **given}
        found = open_texts(sft.eval_data, folder / "held_out", **held)
        held_out, digests["held-out texts"] = found, [found.held.digest]
        notes.append(f"held out: {_note(sft.eval_data, found, length)}")
    pairs = list(zip(chosen.values(), parts, strict=True))
    shares = [(len(part), source.share(len(part))) for source, part in pairs]
    is_weighted = any(source.weight is not None for source, _ in pairs)
    return Supervised(
        Joined(parts),
        shares,
        sum(count if is_weighted else weight for count, weight in shares),
        held_out,
        notes,
        {name: hashlib.sha256(repr(each).encode()).hexdigest() for name, each in digests.items()},
    )


def _note(source: str, rows: TextRows, length: int) -> str:
    held = rows.held
    return (
        f"{source}: {held.texts:,} texts of {held.tokens:,} tokens, ends included, are "
        f"{len(rows):,} rows of {length} tokens"
    )
