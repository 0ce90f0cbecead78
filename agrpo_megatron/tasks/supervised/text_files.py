"""Files of raw texts: which ones a source has, and their texts, read one after the other.

Their begins alone are for plans: about how many ids a file has, by the share that its begin is.
"""

import gzip
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from agrpo_megatron.tasks.data import one_line
from agrpo_megatron.tasks.row_sources import NO_PACKAGE, parse_line

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
COLUMN = "text"
BATCH = 256  # rows of a .parquet file that are read at a time
GZ_BEGIN = 1 << 22  # bytes by which the content of a .gz file is known
UTF8 = "utf-8-sig"  # a mark of the byte order at the begin is no text


def text_files(source: str, *, key: str) -> tuple[list[Path], list[str]]:
    """Return the files of a source, sorted by name, and a note on those that are left out.

    Hidden files and folders do not count.

    Raises:
        ValueError: there are none.
    """
    path = Path(source)
    found = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    every = [file for file in found if file.is_file() and not _is_hidden(file, path)]
    files = [file for file in every if file.name.lower().endswith(ENDINGS)]
    if not files:
        raise ValueError(
            f"{key}={source} names no texts; give a {', '.join(ENDINGS)} file, or a folder of them"
        )
    if not (others := [file.name for file in every if file not in files]):
        return files, []
    said = f"{len(others)} of {len(every)} files are left out, such as {others[0]}"
    return files, [f"{key}={source}: {said}; read are {', '.join(ENDINGS)}"]


def _is_hidden(file: Path, root: Path) -> bool:
    return file != root and any(part.startswith(".") for part in file.relative_to(root).parts)


def texts_of(files: Sequence[Path], column: str, *, key: str) -> Iterator[str]:
    """Yield the texts of files that are not empty.

    Raises:
        ValueError: a file cannot be read, or has something else in the column; names file and row.
    """
    for file in files:
        with _naming(file, column, key):
            yield from filter(None, (_text(value, place) for place, value in _rows(file, column)))


def begin_of(file: Path, column: str, *, key: str, count: int) -> tuple[list[str], float]:
    """Return the first texts of a file, and the share of the file that they are.

    Args:
        count: of texts, at most; of a .txt file as many of 1024 characters.

    Raises:
        ValueError: as `texts_of`.
    """
    kind = file.name.lower()
    with _naming(file, column, key):
        if kind.endswith(".parquet"):
            values = list(itertools.islice(_parquet(file, column), count))
            texts = [_text(value, place) for place, value in enumerate(values, 1)]
            return texts, len(values) / max(1, _opened_parquet(file).metadata.num_rows)
        with _opened(file) as lines:
            if kind.endswith(".txt"):
                begin = [_text(lines.read(1024 * count), 1)]
            else:
                begin = list(itertools.islice(lines, count))
        size = len("".join(begin).encode(errors="surrogateescape"))
        share = min(1.0, size / max(1.0, _content(file)))
        if kind.endswith(".txt"):
            return begin, share
        numbered = ((place, line) for place, line in enumerate(begin, 1) if line.strip())
        return [_text(_cell(line, column, place), place) for place, line in numbered], share


def _content(file: Path) -> float:
    """Return about how many bytes a file holds, which may be compressed."""
    size = file.stat().st_size
    if not file.name.lower().endswith(".gz"):
        return size
    with file.open("rb") as stored, gzip.open(stored) as opened:
        found = len(opened.read(GZ_BEGIN))
        return size * found / max(1, stored.tell())


@contextmanager
def _naming(file: Path, column: str, key: str) -> Iterator[None]:
    """Name the file in errors of its content."""
    try:
        yield
    except KeyError:
        fix = "name the column of the texts by sft.columns={text: NAME}"
        raise ValueError(f"{key}: {file} has no column {column}; {fix}") from None
    except Exception as error:  # of the system, the archive, the format, its library
        raise ValueError(f"{key}: {file} cannot be read ({one_line(error)})") from None


def _text(value: Any, place: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"row {place} has a {type(value).__name__}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"row {place} holds half of a character, or is not UTF-8") from None
    return value


def _rows(file: Path, column: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbered values of a column, lines by their number; a .txt file is one text."""
    name = file.name.lower()
    if name.endswith(".parquet"):
        yield from enumerate(_parquet(file, column), 1)
        return
    with _opened(file) as lines:
        if name.endswith(".txt"):
            yield 1, lines.read()
            return
        for place, line in enumerate(lines, 1):
            if line.strip():
                yield place, _cell(line, column, place)


def _opened(file: Path) -> IO[str]:
    opened: Any = gzip.open if file.name.lower().endswith(".gz") else open
    # A byte that is not UTF-8 becomes half of a character, which `_text` refuses with the row.
    return opened(file, "rt", encoding=UTF8, errors="surrogateescape")


def _cell(line: str, column: str, place: int) -> Any:
    row = parse_line(line, place)
    if not isinstance(row, dict):
        raise ValueError(f"row {place} is a {type(row).__name__}, not an object")
    return row[column]


def _opened_parquet(file: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"the package pyarrow {NO_PACKAGE}") from None
    return parquet.ParquetFile(file)


def _parquet(file: Path, column: str) -> Iterator[Any]:
    opened = _opened_parquet(file)
    if column not in opened.schema_arrow.names:
        raise KeyError(column)
    for batch in opened.iter_batches(BATCH, columns=[column]):
        yield from batch.column(0).to_pylist()
