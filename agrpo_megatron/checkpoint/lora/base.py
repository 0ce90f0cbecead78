"""The base of adapters: the frozen weights, which their checkpoints name by place and digest."""

import hashlib
import json
from pathlib import Path

from agrpo_megatron.checkpoint.integrity import digests
from agrpo_megatron.checkpoint.torch_dist import METADATA
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.parallel import Ranks, gather_objects
from agrpo_megatron.runs.base import Base, check_base, read_base
from agrpo_megatron.runs.progress import BASE_FILE, RUN_SETTINGS, checkpoint_path


def find_base(settings: Settings, ranks: Ranks, checkpoint: Path | None) -> Base:
    """Return the base of a run; called by every rank, which reads a share.

    Args:
        checkpoint: as `base_path` has it.

    Raises:
        ValueError: `model.load` is gone, or holds no weights.
    """
    path = base_path(settings, checkpoint)
    if path is None:
        return Base(None, settings.run.seed, None)
    names = _weight_files(path)
    mine = digests(path, names[ranks.rank :: ranks.world_size])
    found: dict[str, str] = {}
    for part in gather_objects(mine):
        found |= part
    return Base(str(path), settings.run.seed, _digest(found))


def base_path(settings: Settings, checkpoint: Path | None) -> Path | None:
    """Return the folder of the frozen weights; None: they are random.

    Of a run it is the latest checkpoint. It may have trained on since adapters were saved, so these
    have the base that they name, as long as it is there.

    Args:
        checkpoint: of adapters; None: there is none yet.
    """
    load = settings.model.load
    if load is None:
        return None
    if checkpoint is not None and (checkpoint / BASE_FILE).exists():
        named = read_base(checkpoint).load
        if named is not None and Path(named).is_dir():
            return Path(named)
    return checkpoint_path(Path(load)) if Path(load, RUN_SETTINGS).exists() else Path(load)


def verify_base(checkpoint: Path, path: Path) -> None:
    """Check the base of a checkpoint's adapters at a folder; one process.

    Raises:
        ValueError: it is another one.
    """
    check_base(checkpoint, Base(str(path), 0, _digest(digests(path, _weight_files(path)))))


def _weight_files(path: Path) -> list[str]:
    """Return the files that hold weights, sorted; of a checkpoint also its list of tensors."""
    if (path / METADATA).is_file():
        found = [*path.glob("*.distcp"), path / METADATA, *path.glob(BASE_FILE)]
    else:
        found = [*path.rglob("*.safetensors")]
    if not found:
        raise ValueError(
            f"model.load={path}: holds no weights, and adapters need their base; restore it, or "
            "set model.load to where it is"
        )
    return sorted(file.relative_to(path).as_posix() for file in found)


def _digest(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
