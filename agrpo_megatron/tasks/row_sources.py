"""Sources of rows: a local file, a folder of `datasets`, or a data set of Hugging Face's hub."""

import contextlib
import csv
import functools
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agrpo_megatron.tasks.base import Split
from agrpo_megatron.tasks.data import Row, one_line

SAVED = ("state.json", "dataset_dict.json")  # of `save_to_disk`, one split or several
FILES = (".jsonl", ".json", ".csv", ".parquet")
SOURCES = "a .jsonl, .json, .csv or .parquet file (also .gz), or a Hugging Face dataset"
NO_PACKAGE = "is not installed; `pip install agrpo-megatron[data]`, or give a .jsonl or .csv file"
HUB_SPLITS: dict[Split, str] = {"train": "train", "eval": "test"}  # where a source names none
FETCH = "fetch it by `agrpo prefetch FILE` where there is network"
ANSWER_SECONDS = 5.0  # in which the hub has to answer


class DataSet(NamedTuple):
    """A data set as a source names it: `NAME[:CONFIG][@SPLIT]`."""

    name: str
    config: str | None
    split: str | None


def read_rows(source: str, *, key: str, split: str) -> list[tuple[int, Row]]:
    """Return the numbered rows of a file, or of `NAME[:CONFIG][@SPLIT]` on Hugging Face's hub.

    `key` is the setting of the source, for errors; `split` is the default split of a dataset.

    Raises:
        ValueError: the source is missing, unreadable or empty.
    """
    path = Path(source)
    kind = _kind(path)
    if lacking := lack(source):
        raise ValueError(f"{key}={source} {lacking}")
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


def data_set(source: str) -> DataSet:
    """Return the parts of a source that is no file."""
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    return DataSet(name, config or None, split or None)


def lack(source: str) -> str:
    """Return why this machine cannot read a source now, and the fix; empty if it can.

    A data set of the hub is lacking if it is not in the cache of `datasets` and the hub does not
    answer; nothing of it is downloaded.
    """
    if is_local(source):
        return "" if _exists(source) else f"does not exist; give {SOURCES}"
    try:
        import datasets
    except ImportError:
        return ""  # `read_rows` has the fix
    reason, (name, config, _) = _hub_failure(), data_set(source)
    if not reason:
        return ""
    with contextlib.suppress(Exception), _from_cache():
        datasets.load_dataset_builder(name, config)
        return ""
    return (
        f"is a data set that is not on this machine, and the hub does not answer ({reason}); "
        f"{FETCH}"
    )


def _kind(path: Path) -> str:
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending == ".gz" else ending


def _exists(source: str) -> bool:
    return Path(source).exists() or Path(data_set(source).name).exists()


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
                rows = [parse_line(line, place) for place, line in lines]
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


def parse_line(line: str, place: int) -> Any:
    """Return the value of a line of a .jsonl file.

    Raises:
        ValueError: it is no JSON, or an object has a key twice; names the line.
    """
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
    name, config, chosen = data_set(source)
    split = chosen or split
    try:
        if any(Path(name, file).is_file() for file in SAVED):
            return _saved_rows(datasets.load_from_disk(name), split)
        with _from_cache() if _hub_failure() else contextlib.nullcontext():
            found: Any = datasets.load_dataset(name, config, split=split)
        return [dict(row) for row in found]
    except Exception as error:  # many kinds: no such dataset, configuration or split
        raise ValueError(
            f"{key}={source} cannot be loaded ({one_line(error)}); give {SOURCES}"
        ) from None


def _saved_rows(saved: Any, split: str) -> list[Row]:
    """Return the rows of a folder of `save_to_disk`: of its one split, or of the one named."""
    if isinstance(saved, dict) and split not in saved:
        known = ", ".join(map(str, saved))
        raise ValueError(f"it has no split {split}, but {known}; choose one by NAME@SPLIT")
    found = saved[split] if isinstance(saved, dict) else saved
    return [dict(row) for row in found]


@functools.cache
def _hub_failure() -> str:
    """Return why the hub does not answer; empty if it does, whatever it answers."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception as error:  # of its client, which changes with its version
        return one_line(error)
    return ""


@contextlib.contextmanager
def _from_cache() -> Iterator[None]:
    """Let `datasets` read its cache alone, without the half minute in which it asks the hub."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
