"""The sources of supervised data: a file or data set, or several of them with weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agrpo_megatron.config.schema import build, setting
from agrpo_megatron.config.settings import SftSettings
from agrpo_megatron.tasks.supervised.rows import read_conversations
from agrpo_megatron.text.replies import Conversation

KEY = "sft.data"


@dataclass(frozen=True)
class Source:
    """A part of a mixture: the keys of its section."""

    data: str = setting("", "a file or Hugging Face data set")
    weight: float | None = setting(None, "share of the examples, relative to other parts", low=0)
    epochs: float = setting(1.0, "visits of its rows in an epoch of the mixture", low=0)
    columns: dict[str, Any] | None = setting(None, "as sft.columns, which null takes")
    chat: bool | None = setting(None, "as sft.chat, which null takes")

    def share(self, count: int) -> float:
        """Return the weight of this source, which has `count` examples."""
        return count * self.epochs if self.weight is None else self.weight


def sources(sft: SftSettings) -> dict[str, Source]:
    """Return the sources of `sft.data` by the setting that names each.

    Raises:
        ValueError: a part has a wrong key or value, or only some have weights.
    """
    given = sft.data
    if isinstance(given, str):
        found = {KEY: Source(given)}
    elif isinstance(given, Mapping):
        found = {f"{KEY}.{label}.data": _part(label, tree) for label, tree in given.items()}
    else:
        found = {f"{KEY}[{place}]": Source(path) for place, path in enumerate(given or [])}
    if not found:
        raise ValueError(f"{KEY}={given} names no rows; give a file, or null")
    weighted = [source.weight is not None for source in found.values()]
    if any(weighted) and not all(weighted):
        key = next(key for key, source in found.items() if source.weight is None)
        raise ValueError(
            f"{key.removesuffix('.data')} has no weight, and other parts have; give all parts one, "
            "or none: then rows and epochs count"
        )
    return {
        key: replace(
            source,
            columns=sft.columns if source.columns is None else source.columns,
            chat=sft.chat if source.chat is None else source.chat,
        )
        for key, source in found.items()
    }


def read_source(
    key: str, source: Source, *, split: str = "train"
) -> tuple[list[tuple[int, Conversation]], str]:
    """Return the numbered conversations of a source, and a note on how it was read.

    Raises:
        ValueError: as `read_conversations`.
    """
    return read_conversations(
        source.data, key=key, split=split, columns=source.columns, as_chat=source.chat
    )


def _part(label: Any, tree: Any) -> Source:
    """Return a part of a mixture, which is a section or only its file."""
    key = f"{KEY}.{label}"
    if isinstance(tree, str):
        return Source(tree)
    if not isinstance(tree, Mapping):
        raise ValueError(f"{key}={tree!r} must be a file or a section; use {{data: rows.jsonl}}")
    part = build(Source, tree, f"{key}.")
    if not part.data:
        raise ValueError(f"{key} has no data; use for example {{data: rows.jsonl, weight: 2}}")
    if part.weight == 0 or part.epochs == 0:
        name = "weight" if part.weight == 0 else "epochs"
        raise ValueError(f"{key}.{name}=0 leaves its rows out; remove the part")
    if part.weight is not None and part.epochs != 1:
        raise ValueError(
            f"{key}: weight={part.weight:g} and epochs={part.epochs:g} both give its share; use one"
        )
    return part
