"""Which checkpoints a run has and how far it had come; reads small files, needs no torch."""

import json
from dataclasses import dataclass, field
from pathlib import Path

CHECKPOINTS = "checkpoints"
PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a run had come when a checkpoint was written."""

    phase: str  # "sft" or "rl"
    iteration: int  # finished iterations of the phase
    offsets: dict[str, int]  # bytes of each log file that belong to them
    scores: dict[str, float] = field(default_factory=dict)  # of the latest evaluation

    @property
    def name(self) -> str:
        """Return the checkpoint's directory name, which sorts in order of time within a phase."""
        return f"{self.phase}-{self.iteration:06d}"


def latest_checkpoint(root: Path) -> tuple[Path, Progress] | None:
    """Return the newest whole checkpoint below `root`, if there is one.

    Raises:
        RuntimeError: `latest` points at something that is not there.
    """
    pointer = root / "latest"
    if not pointer.exists():
        return None
    path = root / pointer.read_text(encoding="utf-8").strip()
    return path, read_progress(path)


def read_progress(path: Path) -> Progress:
    """Read a checkpoint's progress record.

    Raises:
        RuntimeError: the directory does not hold a whole checkpoint.
    """
    try:
        return Progress(**json.loads((path / PROGRESS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise RuntimeError(f"{path} does not hold a whole checkpoint") from None


def checkpoint_path(run_dir: Path, name: str | None = None) -> Path:
    """Return a checkpoint of a run: the latest, or the one of this name.

    Raises:
        ValueError: there is none; names those there are.
    """
    root = run_dir / CHECKPOINTS
    names = sorted(p.name for p in root.glob("*-*") if not p.name.startswith("."))
    if name is None:
        found = latest_checkpoint(root)
        if found is None:
            raise ValueError(f"{run_dir} holds no checkpoint; train it first")
        return found[0]
    if name not in names:
        known = ", ".join(names) or "none yet"
        raise ValueError(f"{run_dir} holds no checkpoint {name}; it has {known}")
    return root / name
