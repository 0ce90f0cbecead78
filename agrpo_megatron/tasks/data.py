"""Problem files: rows of a local file or of a Hugging Face dataset, and leaks between splits."""

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy

from agrpo_megatron.tasks.base import Task, distinct
from agrpo_megatron.types import Problem

type Row = dict[str, Any]

FILES = (".jsonl", ".json", ".csv", ".parquet")
SOURCES = "a .jsonl, .json, .csv or .parquet file (also .gz), or a Hugging Face dataset"
NO_PACKAGE = "is not installed; `pip install agrpo-megatron[data]`, or give a .jsonl or .csv file"


def read_rows(source: str, *, key: str, split: str) -> list[Row]:
    """Return the rows of a file, or of `NAME[:CONFIG][@SPLIT]` on the Hugging Face hub.

    Args:
        key: the setting of the source, for errors.
        split: default split of a dataset.

    Raises:
        ValueError: the source is missing, unreadable or empty.
    """
    path = Path(source)
    kind = _kind(path)
    if kind in FILES:
        if not path.exists():
            raise ValueError(f"{key}={source} does not exist; give {SOURCES}")
        rows = _read_file(path, kind, key=key)
    else:
        rows = _read_dataset(source, key=key, split=split)
    if not rows:
        raise ValueError(f"{key}={source} holds no rows; give {SOURCES} with some")
    return rows


def is_local(source: str) -> bool:
    """Return whether `read_rows` needs no network for a source."""
    return _kind(Path(source)) in FILES or Path(source).exists()


def to_problems(
    rows: Iterable[Row], make: Callable[[Row], Problem], *, key: str, source: str
) -> list[Problem]:
    """Convert rows to problems; drop rows that repeat a key.

    Raises:
        ValueError: a row lacks a column or has a wrong value; the message names the row.
    """
    problems: list[Problem] = []
    for number, row in enumerate(rows, start=1):
        try:
            problems.append(make(row))
        except KeyError as error:
            known = ", ".join(map(str, row)) or "none"
            raise ValueError(
                f"{key}={source}, row {number}: no column {error.args[0]}; it has {known}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{key}={source}, row {number}: {error}") from None
    return distinct(problems)


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


def d1_rows(rows: Sequence[Row], count: int = 256) -> list[Row]:
    """Draw the evaluation rows of d1 for Countdown and Sudoku, in its order."""
    drawn = numpy.random.RandomState(42).choice(len(rows), min(count, len(rows)), replace=False)
    return [rows[place] for place in drawn]


def one_line(error: Exception) -> str:
    """Return the message of a library's error as one short line."""
    return " ".join(str(error).split())[:200]


def optional_column(row: Row, *names: str) -> Any:
    """Return a row's value in the first of `names` that it has, in any letter case, or None."""
    folded = {str(name).casefold(): value for name, value in row.items()}
    return next((folded[name] for name in names if folded.get(name) is not None), None)


def first_column(row: Row, *names: str) -> Any:
    """Return the same as `optional_column`; raise a KeyError instead of returning None."""
    value = optional_column(row, *names)
    if value is None:
        raise KeyError(" or ".join(names))
    return value


def text_column(row: Row, *names: str) -> str:
    """Return the text in the first of `names` that a row has."""
    value = first_column(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {' or '.join(names)} holds {value!r:.80}, which is not text")
    return value


def to_whole(value: Any, *names: str) -> int:
    """Return a column's value as a whole number."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, bool | float) and value != number:
        raise ValueError(
            f"column {' or '.join(names)} holds {value!r:.80}, which is not a whole number"
        )
    return number


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _read_file(path: Path, kind: str, *, key: str) -> list[Row]:
    try:
        if kind == ".parquet":
            return _read_parquet(path)
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            if kind == ".csv":
                return [dict(row) for row in csv.DictReader(file)]
            if kind == ".json":
                rows = json.load(file)
            else:
                rows = [_parse_line(line, place) for place, line in enumerate(file, start=1)]
                rows = [row for row in rows if row is not None]
    except (OSError, ValueError, csv.Error, EOFError, RecursionError) as error:
        raise ValueError(
            f"{key}={path} is not readable as {kind} ({one_line(error)}); give {SOURCES}"
        ) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key}={path} must hold one object for each problem; give {SOURCES}")
    return rows


def _parse_line(line: str, place: int) -> Any:
    try:
        return json.loads(line) if line.strip() else None
    except ValueError as error:
        raise ValueError(f"line {place}: {error}") from None


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"the package pyarrow {NO_PACKAGE}") from None
    return parquet.read_table(path).to_pylist()


def _read_dataset(source: str, *, key: str, split: str) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{key}={source}: the package datasets {NO_PACKAGE}") from None
    name, _, chosen = source.partition("@")
    name, _, config = name.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=chosen or split)
        return [dict(row) for row in dataset]  # type: ignore[union-attr]
    except Exception as error:  # many kinds: no network, no such dataset, configuration or split
        raise ValueError(
            f"{key}={source} cannot be loaded ({one_line(error)}); give {SOURCES}"
        ) from None
