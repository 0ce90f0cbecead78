"""Atomic file writes, free names, and the digest of bytes."""

import errno
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# safetensors and Megatron pass on only the text of the system's error.
FULL = re.compile("|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT))))


class DiskFull(ValueError):
    """The disk is full; the message names the folder and the fix."""


def write_whole(path: Path, text: str) -> None:
    """Write or replace a file atomically: a kill leaves the earlier content in place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file with one in each line; none of a missing file.

    A line that a kill cut short is left out.
    """
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append a line for each record; a line that a kill cut short is ended first."""
    lines = [json.dumps(record, default=str) + "\n" for record in records]
    if lines:
        with path.open("ab+") as stream:
            stream.seek(max(0, stream.tell() - 1))
            is_cut = stream.read() not in (b"", b"\n")
            stream.write(("\n" * is_cut + "".join(lines)).encode())


def check_folder(path: Path, *, key: str) -> None:
    """Check that a folder can be written, or made; leaves nothing behind.

    Raises:
        ValueError: it cannot; names `key`, the setting or argument.
    """
    whole = path.absolute()
    there = next(folder for folder in (whole, *whole.parents) if os.path.lexists(folder))
    try:
        if there != whole:
            with tempfile.TemporaryDirectory(prefix=".agrpo-", dir=there) as trial:
                (Path(trial) / whole.relative_to(there)).mkdir(parents=True)
        elif not os.access(f"{there}/", os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, "no folder that this user may write")
    except OSError as error:
        raise ValueError(
            f"{key}={path} cannot be written ({there}: {error.strerror}); choose another folder, "
            "or make this one writable"
        ) from None


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Replace any error that a full disk caused.

    Raises:
        DiskFull: an error, or a cause of it, was a full disk or an exceeded quota.
    """
    try:
        yield
    except Exception as error:
        link: BaseException | None = error
        while link is not None and not (found := FULL.search(f"{link} {link!r}")):
            link = link.__cause__ or link.__context__
        if link is None:
            raise
        raise DiskFull(
            f"{folder} cannot be written ({found[0]}); what is saved there stays whole: free "
            "some space, or raise the quota, and run the same command again"
        ) from error


def free_name(path: Path) -> Path:
    """Return the first of `NAME.1`, `NAME.2`, ... that is free."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def digest(content: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def shipped(name: str) -> Path:
    """Return a file that comes with the package: in the package, or next to it in a checkout.

    Raises:
        RuntimeError: neither has it.
    """
    package = Path(__file__).resolve().parent.parent
    for root in (package, package.parent):
        if (root / name).is_file():
            return root / name
    raise RuntimeError(f"{package.parent} holds no {name}; reinstall the package")
