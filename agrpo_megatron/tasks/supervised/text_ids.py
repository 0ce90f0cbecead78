"""The ids of raw texts in a file: written once by the first rank of a job, awaited by the others.

A folder has `tokens.bin`, the ids of all texts of a source as int32, each text with an end-of-text
after it, and `index.json`, which comes last: without it, or with another size, nothing counts.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy

from agrpo_megatron.text.tokenizer import Tokenizer

BATCH = 256  # texts that are tokenized in one call
TOKENS, INDEX = "tokens.bin", "index.json"
TOKEN_BYTES = 4
WAIT = 0.2  # seconds between two looks for the file that the first rank writes
PATIENCE = 900.0  # seconds in which it has to write something


@dataclass(frozen=True)
class Index:
    """What a file of ids holds."""

    key: str  # of the texts' files and the tokenizer
    texts: int
    tokens: int
    digest: str  # of the ids
    unknown: int  # texts with an id for what the tokenizer lacks
    control: int  # texts with ids without text, such as the mask token
    named: str  # one of them


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return what ids depend on besides their texts."""
    pieces = [tokenizer.to_piece(number) for number in range(tokenizer.vocab_size)]
    return hashlib.sha256(json.dumps([tokenizer.eos_id, pieces]).encode()).hexdigest()


def ids_key(files: Sequence[Path], column: str, tokenizer: str) -> str:
    """Return what the ids of files depend on, without where these are.

    Args:
        tokenizer: its digest.
    """
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps([stats, column, tokenizer]).encode()).hexdigest()


def ids_of(
    texts: Iterator[str], folder: Path, *, key: str, tokenizer: Tokenizer, said: str
) -> Index:
    """Return the index of the folder's ids, which the first rank writes if they are others.

    Args:
        key: as `ids_key`.
        said: setting and value of the source, for errors.

    Raises:
        ValueError: there are no texts.
        RuntimeError: the first rank writes nothing.
    """
    found = _read_index(folder, key)
    if found is None and os.environ.get("RANK", "0") == "0":
        return _write(folder, key, texts, tokenizer, said=said)
    return found or _awaited(folder, key, said=said)


def _read_index(folder: Path, key: str) -> Index | None:
    """Return what the folder's file of ids holds; None if it is missing, or of other texts."""
    try:
        found = Index(**json.loads((folder / INDEX).read_text(encoding="utf-8")))
        size = (folder / TOKENS).stat().st_size
    except (OSError, ValueError, TypeError):
        return None
    return found if found.key == key and size == TOKEN_BYTES * found.tokens else None


def _awaited(folder: Path, key: str, *, said: str) -> Index:
    """Return the index that the first rank writes, once it is there."""
    sizes, changed = list[tuple[str, int]](), time.monotonic()
    while (found := _read_index(folder, key)) is None:
        now = [] if not folder.is_dir() else sorted(map(_sized, folder.iterdir()))
        if now != sizes:
            sizes, changed = now, time.monotonic()
        if time.monotonic() - changed > PATIENCE:
            raise RuntimeError(
                f"{said}: the first rank has written nothing to {folder} for {PATIENCE:g} s; all "
                "ranks need the same run.dir, and text files of the same names, sizes and times"
            )
        time.sleep(WAIT)
    return found


def _sized(file: Path) -> tuple[str, int]:
    try:
        return file.name, file.stat().st_size
    except OSError:  # it was renamed meanwhile
        return file.name, -1


def _write(
    folder: Path, key: str, texts: Iterator[str], tokenizer: Tokenizer, *, said: str
) -> Index:
    """Write the ids of texts, and what they are; the index comes last, so a kill leaves none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    for left in folder.glob(f".{TOKENS}.*"):  # by a kill
        left.unlink()
    partial = folder / f".{TOKENS}.{os.getpid()}"
    count = tokens = unknown = held = 0
    named, digest = "", hashlib.sha256()
    control = tokenizer.special - {tokenizer.unknown_id}
    with partial.open("wb") as file:
        for ids in _encoded(texts, tokenizer):
            line = numpy.array([*ids, tokenizer.eos_id], "<i4").tobytes()
            file.write(line)
            digest.update(line)
            count, tokens = count + 1, tokens + len(ids) + 1
            unknown += tokenizer.unknown_id in ids
            if not control.isdisjoint(ids):
                held, named = held + 1, named or tokenizer.decode_raw([min(control & {*ids})])
        file.flush()
        os.fsync(file.fileno())
    if not tokens:
        partial.unlink()
        raise ValueError(f"{said} holds no texts")
    partial.rename(folder / TOKENS)
    index = Index(key, count, tokens, digest.hexdigest(), unknown, held, named)
    new = folder / f".{INDEX}.{os.getpid()}"
    new.write_text(json.dumps(asdict(index)), encoding="utf-8")
    new.rename(folder / INDEX)
    return index


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the ids of texts that have any."""
    for batch in itertools.batched(texts, BATCH):
        yield from filter(None, tokenizer.encode_prompts(batch))
