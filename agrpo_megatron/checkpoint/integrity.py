"""Checksums of a checkpoint's files: written when it is complete, verified before loading."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "checksums.json"
THREADS = 4  # hashing overlaps reading


class Damaged(ValueError):
    """A checkpoint whose files changed after the save; the message names the first."""


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files below a folder."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def seal(folder: Path, known: dict[str, str] | None = None) -> None:
    """Write the checksums of all files below a folder; files in `known` are not read again."""
    known = known or {}
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    found = {**digests(folder, sorted(names - known.keys() - {MANIFEST})), **known}
    text = json.dumps(dict(sorted(found.items())), indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify(folder: Path, *, share: int = 0, shares: int = 1) -> None:
    """Compare files with their checksums; a folder without checksums passes.

    Args:
        share, shares: check every `shares`-th file, from the `share`-th on.

    Raises:
        Damaged: a file is missing or differs.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    try:
        expected = dict(json.loads(manifest.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise Damaged(f"{manifest}: cannot be read ({error})") from None
    names = sorted(expected)[share::shares]
    for name in names:
        if not (folder / name).is_file():
            raise Damaged(f"{folder / name}: the file is missing")
    try:
        found = digests(folder, names)
    except OSError as error:
        raise Damaged(f"{folder}: cannot be read ({error})") from None
    for name in names:
        if found[name] != expected[name]:
            raise Damaged(f"{folder / name}: damaged, its SHA-256 has changed")
