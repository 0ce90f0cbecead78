"""Problem files: rows of a local file or of a Hugging Face dataset, and leaks between splits."""

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from agrpo_megatron.tasks.base import Task
from agrpo_megatron.tasks.rewards.latex import is_equivalent
from agrpo_megatron.types import Problem

type Row = dict[str, Any]

SAVED = ("state.json", "dataset_dict.json")  # of `save_to_disk`, one split or several
FILES = (".jsonl", ".json", ".csv", ".parquet")
SOURCES = "a .jsonl, .json, .csv or .parquet file (also .gz), or a Hugging Face dataset"
NO_PACKAGE = "is not installed; `pip install agrpo-megatron[data]`, or give a .jsonl or .csv file"


def read_rows(source: str, *, key: str, split: str) -> list[tuple[int, Row]]:
    """Return the numbered rows of a file, or of `NAME[:CONFIG][@SPLIT]` on Hugging Face's hub.

    `key` is the setting of the source, for errors; `split` is the default split of a dataset.

    Raises:
        ValueError: the source is missing, unreadable or empty.
    """
    path = Path(source)
    kind = _kind(path)
    if is_local(source) and not _exists(source):
        raise ValueError(f"{key}={source} does not exist; give {SOURCES}")
    if path.is_file() and kind not in FILES:
        raise ValueError(f"{key}={source} has an unknown ending; give {SOURCES}")
    if kind in FILES:
        rows = _read_file(path, kind, key=key)
    else:
        rows = _read_dataset(source, key=key, split=split)
    if not rows:
        raise ValueError(f"{key}={source} holds no rows; give {SOURCES} with some")
    return list(enumerate(rows, start=1))


def is_local(source: str) -> bool:
    """Return whether `read_rows` needs no network for a source."""
    is_path = source.startswith(("/", ".", "~")) or _kind(Path(source)) in FILES
    return is_path or _exists(source)


def convert_rows[T](
    rows: Iterable[tuple[int, Row]], make: Callable[[Row], T], *, key: str, source: str
) -> list[tuple[int, T]]:
    """Convert numbered rows, to problems for example.

    Raises:
        ValueError: a row lacks a column or has a wrong value; the message names the row.
    """
    made: list[tuple[int, T]] = []
    for number, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError("must hold one object with the columns as keys")
            made.append((number, make(row)))
        except KeyError as error:
            known = one_line(", ".join(map(str, row)) or "none")
            raise ValueError(
                f"{key}={source}, row {number}: no column {error.args[0]}; it has {known}"
            ) from None
        except (ValueError, RecursionError) as error:  # of a deeply nested value
            raise ValueError(f"{key}={source}, row {number}: {error}") from None
    return made


def without_repeats(found: Iterable[tuple[int, Problem]]) -> tuple[list[Problem], list[str]]:
    """Return the first problem of each key, and notes that count the rest and their answers."""
    first: dict[str, tuple[int, Problem]] = {}
    repeated, unlike = 0, []
    for row, problem in found:
        other_row, other = first.setdefault(problem.key, (row, problem))
        repeated += other is not problem
        theirs, mine = (p.fields.get("answer", p.fields.get("solution")) for p in (other, problem))
        if mine != theirs and not is_equivalent(str(mine), str(theirs)):
            unlike.append(f"rows {other_row} and {row}: {theirs!r:.40} and {mine!r:.40}")
    notes = [f"{repeated} repeated problems left out"] if repeated else []
    if unlike:
        notes.append(f"{len(unlike)} of them contradict the row kept, such as {unlike[0]}")
    return [problem for _, problem in first.values()], notes


def without_leaks(
    train: Sequence[Problem],
    held_out: Sequence[Problem],
    *,
    task: Task,
    holder: Task,
    name: str,
    by: str = "",
) -> tuple[Sequence[Problem], list[str]]:
    """Remove held-out problems from a task's training problems; return the rest, and notes.

    `holder` is the task of `held_out`: in a mixture, another part; `by` names it in errors.

    Raises:
        ValueError: a leak with task.leaks=refuse, or no training problem is left.
    """
    taken = {task.leak_key(problem, holder) for problem in held_out}
    kept = [problem for problem in train if task.leak_key(problem, holder) not in taken]
    if len(kept) == len(train):
        return kept, []
    found = f"{len(train) - len(kept)} of {len(train)} training problems are also held out{by}"
    leaks = task.settings.leaks
    if leaks == "keep":
        return train, [f"{name}: {found}; KEPT (task.leaks=keep)"]
    if leaks == "refuse":
        raise ValueError(f"task {name}: {found}; use task.leaks=drop, or another file")
    if not kept:
        raise ValueError(
            f"task {name}: all training problems are also held out{by}; use "
            "another file for task.options.train, or none to evaluate only"
        )
    return kept, [f"{name}: {found}; left out"]


def one_line(error: object) -> str:
    """Return the message of a library's error as one short line of printable characters."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def optional_column(row: Row, *names: str) -> Any:
    """Return a row's value in the first of `names` that it has, in any letter case, or None.

    Blank text, NaN and an empty list are None: tables write a missing value so.
    """
    found = (_cell(row, name) for name in names)
    return next((value for value in found if not _is_missing(value)), None)


def first_column(row: Row, *names: str) -> Any:
    """Return the same as `optional_column`; raise an error instead of returning None."""
    value, either = optional_column(row, *names), " or ".join(names)
    if value is None and has_column(row, *names):
        raise ValueError(f"column {either} is empty")
    if value is None:
        raise KeyError(either)
    return value


def has_column(row: Row, *names: str) -> bool:
    """Return whether a row has one of `names`, in any letter case; its value may be missing."""
    return any(str(column).casefold() in names for column in row)


def text_column(row: Row, *names: str) -> str:
    """Return the text in the first of `names` that a row has."""
    value = first_column(row, *names)
    if not isinstance(value, str):
        raise wrong_value(value, "text", *names)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"column {' or '.join(names)} holds {value[error.start]!r} at character "
            f"{error.start + 1}, half of a character or a byte that is not UTF-8; remove it"
        ) from None
    return value


def answer_column(row: Row, name: str) -> str | None:
    """Return the one answer in a column, or None: text, a number, or a list that holds only it."""
    value = optional_column(row, name)
    if isinstance(value, list | tuple) and len(value) == 1:
        value = optional_column({name: value[0]}, name)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        value = f"{Decimal(str(value)):f}"
        value = value.rstrip("0").rstrip(".") if "." in value else value
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise wrong_value(value, "one answer", name)
    return None if value is None else text_column({name: str(value)}, name)


def to_whole(value: Any, *names: str) -> int:
    """Return a column's value as a whole number."""
    try:
        number = None if isinstance(value, bool) else int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not isinstance(value, str) and value != number:
        raise wrong_value(value, "a whole number", *names)
    return number


def wrong_value(value: Any, what: str, *names: str) -> ValueError:
    return ValueError(f"column {' or '.join(names)} holds {value!r:.80}, which is not {what}")


def _cell(row: Row, name: str) -> Any:
    found = [column for column in row if str(column).casefold() == name]
    if len(found) > 1:
        raise ValueError(f"the columns {' and '.join(found)} differ only in letter case; keep one")
    return row[found[0]] if found else None


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    is_nan = isinstance(value, float | Decimal) and math.isnan(value)
    return value is None or is_nan or isinstance(value, list | tuple) and not value


def _kind(path: Path) -> str:
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending == ".gz" else ending


def _exists(source: str) -> bool:
    return Path(source).exists() or Path(source.partition("@")[0].partition(":")[0]).exists()


def _read_file(path: Path, kind: str, *, key: str) -> list[Row]:
    try:
        if kind == ".parquet":
            return _read_parquet(path)
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        # A byte that is not UTF-8 becomes a lone surrogate: `text_column` refuses it with the row.
        utf8, errors = "utf-8-sig", "surrogateescape"
        with opened(path, "rt", encoding=utf8, errors=errors, newline="") as file:
            if kind == ".csv":
                return _read_csv(file)
            if kind == ".json":
                rows = json.load(file, object_pairs_hook=_object)
            else:
                lines = ((place, line) for place, line in enumerate(file, 1) if line.strip())
                rows = [_parse_line(line, place) for place, line in lines]
    except Exception as error:  # many kinds: of the system, the archive, the format, its library
        raise ValueError(
            f"{key}={path} is not readable as {kind} ({one_line(error)}); give {SOURCES}"
        ) from None
    if not isinstance(rows, list):
        raise ValueError(f"{key}={path} must hold a list of objects; give {SOURCES}")
    return rows


def _read_csv(file: Iterable[str]) -> list[Row]:
    reader = csv.DictReader(file, strict=True)
    _object([(name, None) for name in reader.fieldnames or [] if name])
    rows = list(reader)
    wide = next((number for number, row in enumerate(rows, start=1) if None in row), None)
    if wide is not None:
        raise ValueError(f"row {wide} has more cells than the header")
    return rows


def _object(pairs: Sequence[tuple[str, Any]]) -> Row:
    """Return a row as a dict; refuse a column that occurs twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a column occurs twice: {', '.join(name for name, _ in pairs)}")
    return row


def _parse_line(line: str, place: int) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {place}: {error}") from None


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"the package pyarrow {NO_PACKAGE}") from None
    return parquet.read_table(path).to_pylist()


def _read_dataset(source: str, *, key: str, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{key}={source}: the package datasets {NO_PACKAGE}") from None
    name, _, chosen = source.partition("@")
    name, _, config = name.partition(":")
    split = chosen or split
    try:
        if any(Path(name, file).is_file() for file in SAVED):
            saved = datasets.load_from_disk(name)
            found: Any = saved[split] if isinstance(saved, dict) else saved
        else:
            found = datasets.load_dataset(name, config or None, split=split)
        return [dict(row) for row in found]
    except Exception as error:  # many kinds: no network, no such dataset, configuration or split
        raise ValueError(
            f"{key}={source} cannot be loaded ({one_line(error)}); give {SOURCES}"
        ) from None
