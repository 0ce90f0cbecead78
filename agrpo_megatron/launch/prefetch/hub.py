"""Ask a hub for files and their sizes, and fetch them with its own client; errors of one line.

`HF_ENDPOINT` names another hub, `HF_TOKEN` the user. What was fetched stays, so the same command
resumes.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from agrpo_megatron.hardware.machine import one_line
from agrpo_megatron.launch.prefetch.sources import FETCHED, Source
from agrpo_megatron.runs.files import naming_full_disk
from agrpo_megatron.scaling.forecast.disk import size

# Weights as safetensors, and all other files that a run or an export reads: no pickles.
WANTED = re.compile(r"[^/]+\.(safetensors|json|jinja|model|txt|py|md)|LICENSE[^/]*")
PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")


@dataclass(frozen=True)
class Listing:
    """The files of a source that are still missing here."""

    source: Source
    commit: str  # of the hub
    files: dict[str, int]  # bytes by name; of data, of the whole data set
    skipped: int  # bytes of files that a run does not read

    @property
    def total(self) -> int:
        """Return the bytes to fetch."""
        return sum(self.files.values())


def listing(source: Source, *, takes_all: bool = False) -> Listing:
    """Return the files to fetch from a source.

    Args:
        takes_all: also pickles, subfolders and other formats.

    Raises:
        ValueError: the hub has no such repository, refuses it, has only pickles, or is not reached.
    """
    api = HfApi()
    ask = api.dataset_info if source.is_data else api.model_info
    with _one_line(source):
        info = ask(source.name, files_metadata=True)
    siblings = info.siblings or []
    files = {each.rfilename: each.size or 0 for each in siblings}
    chosen = {
        name: count
        for name, count in files.items()
        if takes_all or source.is_data or WANTED.fullmatch(name)
    }
    if not source.is_data and not takes_all:
        _check_format(source, chosen, files)
    if source.is_data:
        missing = {} if source.path.exists() else chosen
    else:
        here = {each.rfilename for each in siblings if _is_there(source.folder, each)}
        missing = {name: count for name, count in chosen.items() if name not in here}
    skipped = sum(files.values()) - sum(chosen.values())
    return Listing(source, info.sha or "main", missing, skipped)


def fetch(found: Listing) -> None:
    """Fetch what is missing of a source; what is there already stays.

    Raises:
        ValueError: as `listing`, or the disk is full.
    """
    source = found.source
    if not found.files:
        return
    folder = source.path.parent if source.is_data else source.folder
    _check_room(folder, found)
    folder.mkdir(parents=True, exist_ok=True)
    with naming_full_disk(folder), _one_line(source):
        if source.is_data:
            _fetch_data(found)
        else:
            names = [_literal(name) for name in found.files]
            target = {"local_dir": folder, "allow_patterns": names}
            snapshot_download(source.name, revision=found.commit, **target)


def _fetch_data(found: Listing) -> None:
    """Write a split of a data set as one parquet file, whole or not at all."""
    from datasets import load_dataset

    source = found.source
    data = load_dataset(source.name, source.config, split=source.split, revision=found.commit)
    partial = source.path.with_suffix(".partial")
    data.to_parquet(str(partial))  # type: ignore[union-attr]
    partial.replace(source.path)


def _is_there(folder: Path, there: RepoSibling) -> bool:
    """Return whether a file of the hub is here whole, and not that of another commit.

    Of a file that the client did not fetch only the size is compared.
    """
    path, notes = folder / there.rfilename, folder / FETCHED / "download"
    if not path.is_file() or path.stat().st_size != (there.size or 0):
        return False
    # Of the client: commit, hash of the content, time.
    note = notes / f"{there.rfilename}.metadata"
    fetched = note.read_text(encoding="utf-8").split() if note.is_file() else []
    content = there.lfs.sha256 if there.lfs else there.blob_id
    return len(fetched) < 2 or content is None or fetched[1] == content


def _check_format(source: Source, chosen: dict[str, int], files: dict[str, int]) -> None:
    """Check that a model's repository has a configuration, and weights without pickles."""
    if source.keys == ("tokenizer.path",):
        return
    if not any(name.endswith(".safetensors") for name in chosen):
        pickles = [name for name in files if PICKLES.fullmatch(name)]
        what = f"only pickles such as {pickles[0]}, which are not opened" if pickles else "none"
        raise ValueError(
            f"{source.name} has no weights in safetensors ({what}); choose a repository that has "
            "them, or fetch it as it is with --all and convert it elsewhere"
        )


def _check_room(folder: Path, found: Listing) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < found.total:
        raise ValueError(
            f"{folder} has {size(free)} free, and {found.source.name} takes {size(found.total)}; "
            "free some space, or choose another folder by --to"
        )


def _literal(name: str) -> str:
    """Return a file's name as a pattern that matches only it."""
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextmanager
def _one_line(source: Source) -> Iterator[None]:
    """Replace an error of the hub's client by one line that says what to do."""
    at = f"{source.keys[0]}: {source.name} at {constants.ENDPOINT}"
    try:
        yield
    except GatedRepoError:
        raise ValueError(
            f"{at} asks for consent; accept its terms on its page, and set HF_TOKEN or log in by "
            "`hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{at} does not exist or is private; check the name (--weights OWNER/NAME for "
            "model.load), or set HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        raise ValueError(f"{at} cannot be fetched ({one_line(error)}); try again later") from None
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise  # of this machine's disk
        raise ValueError(_unreached(at, error)) from None
    except Exception as error:  # of httpx, and of `datasets`
        raise ValueError(_unreached(at, error)) from None


def _unreached(at: str, error: Exception) -> str:
    return (
        f"{at} cannot be reached or read ({one_line(error)}); fetch on a machine with network and "
        "copy the folder, and try the same command again: it resumes"
    )
