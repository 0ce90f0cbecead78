"""What a settings file names that is not on this machine, and the settings that name it there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.loaded_model import missing_files
from agrpo_megatron.runs.missing_data import (
    evaluation_sources,
    row_sources,
    task_key,
    task_sources,
)
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.row_sources import data_set, is_local

# Who publishes weights of a name that begins so: recipes name the folder, not the publisher.
OWNERS = {
    "LLaDA2": "inclusionAI",
    "LLaDA-MoE": "inclusionAI",
    "LLaDA": "GSAI-ML",
    "Dream": "Dream-org",
    "DiffuCoder": "apple",
    "SDAR": "JetLM",
    "TraDo": "Gen-Verse",
    "Nemotron": "nvidia",
}
FETCHED = Path(".cache", "huggingface")  # left in a folder by the hub's client


@dataclass(frozen=True)
class Source:
    """One thing to fetch."""

    keys: tuple[str, ...]  # settings that name it, by dotted name
    is_data: bool
    name: str  # on the hub: OWNER/NAME
    folder: Path  # weights: where they go; data: where the file goes
    config: str | None = None
    split: str = ""

    @property
    def path(self) -> Path:
        """The folder, or the file, that a run reads."""
        if not self.is_data:
            return self.folder
        parts = [self.name.replace("/", "--"), self.config, self.split]
        return self.folder / f"{'-'.join(part for part in parts if part)}.parquet"


def sources(settings: Settings, folder: Path, *, weights: str | None = None) -> list[Source]:
    """Return what settings name that is missing here; each thing once.

    A missing folder of `model.load`, `tokenizer.path` or `lora.load` is fetched to where the
    settings expect it; a hub's name goes below `folder`, and so do data sets.

    Args:
        weights: the hub's name of `model.load`; None: the setting itself, or by its publisher.

    Raises:
        ValueError: the publisher of a folder is not known, or the task is wrong.
    """
    found: dict[Path, Source] = {}
    for source in (*_weights(settings, folder, weights), *_data(settings, folder)):
        earlier = found.setdefault(source.path, replace(source, keys=()))
        if earlier.name != source.name:
            first = f"{earlier.keys[0]}={earlier.name}"
            raise ValueError(
                f"{first} and {source.keys[0]}={source.name} would both go to {source.path}; "
                "fetch one of them elsewhere, and name its folder"
            )
        found[source.path] = replace(earlier, keys=(*earlier.keys, *source.keys))
    return list(found.values())


def overrides(settings: Settings, found: list[Source]) -> dict[str, Any]:
    """Return the settings by which a run reads what was fetched."""
    named: dict[str, Any] = {key: str(source.path) for source in found for key in source.keys}
    given = settings.sft.data
    if isinstance(given, list):  # a list is replaced as a whole
        paths = [named.pop(f"sft.data[{place}]", path) for place, path in enumerate(given)]
        named |= {"sft.data": paths} if paths != given else {}
    return named


def _weights(settings: Settings, folder: Path, weights: str | None) -> Iterator[Source]:
    named = {
        "model.load": settings.model.load,
        "tokenizer.path": settings.tokenizer.path,
        "lora.load": settings.lora.load,
    }
    for key, value in named.items():
        if value is None or _is_whole(settings, key, Path(value)):
            continue
        own = weights if value == settings.model.load else None  # also its tokenizer
        name = own or _hub_name(value, key=key)
        target = folder / value.rpartition("/")[2] if name == value else Path(value)
        yield Source((key,), is_data=False, name=name, folder=target)


def _is_whole(settings: Settings, key: str, path: Path) -> bool:
    """Return whether a folder is here and came whole; one that was fetched is compared again."""
    if not path.exists() or (path / FETCHED).exists():
        return False
    return key != "model.load" or missing_files(settings) is None


def _hub_name(value: str, *, key: str) -> str:
    """Return the hub's name of a missing folder.

    A name of the hub has one slash; so has `models/NAME`, where publishers are known by the name.
    """
    owner, slash, name = value.rpartition("/")
    publisher = next((who for start, who in OWNERS.items() if name.startswith(start)), None)
    if slash and "/" not in owner and owner not in ("", ".", "..", "~", "models", "runs"):
        return value
    if publisher is None:
        raise ValueError(
            f"{key}={value} is missing here, and its name on the hub is not known; give it as "
            f"{key}=OWNER/NAME, or for model.load as --weights OWNER/NAME"
        )
    return f"{publisher}/{name}"


def _data(settings: Settings, folder: Path) -> Iterator[Source]:
    """Yield the data sets that settings name; files are not fetched."""
    task = settings.task
    named = [*task_sources(build_task(task), task_key("task", task)), *row_sources(settings.sft)]
    named += evaluation_sources(settings)
    for key, source, split in named:
        if not is_local(source):
            name, config, chosen = data_set(source)
            split, target = chosen or split, folder / "data"
            yield Source((key,), is_data=True, name=name, folder=target, config=config, split=split)
