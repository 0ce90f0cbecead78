"""Atomic file writes, free names, and the digest of bytes."""

import hashlib
import itertools
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write or replace a file atomically: a kill leaves the earlier content in place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def free_name(path: Path) -> Path:
    """Return the first of `NAME.1`, `NAME.2`, ... that is free."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def digest(content: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()
