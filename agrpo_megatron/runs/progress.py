"""The checkpoints of a run and their progress; reads small files, needs no torch."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agrpo_megatron.runs.files import free_name, write_whole

RUN_SETTINGS = "config.yaml"  # in a run directory: the settings of the run
CHECKPOINTS = "checkpoints"
PROGRESS_FILE = "progress.json"
LATEST, BEST = "latest", "best"  # files that name a checkpoint
PARTIAL, DAMAGED = ".partial-", "damaged-"
# In a checkpoint with the tensors: settings of the model and of the run, Hugging Face files.
MODEL_FILE, RUN_FILE, HF = "model.yaml", "run.yaml", "hf"
BASE_FILE = "base.json"  # in a checkpoint of adapters: what they were trained on
TEMPLATE = "chat_template.jinja"  # in `hf`: the file that tokenizer.chat_template names
PHASES = ("sft", "rl")


@dataclass(frozen=True)
class Progress:
    """The progress of a run at a checkpoint."""

    phase: str  # "sft" or "rl"
    iteration: int  # finished iterations of the phase
    offsets: dict[str, int]  # bytes of each log file at that point
    scores: dict[str, float] = field(default_factory=dict)  # of the latest evaluation
    best: float | None = None  # highest `checkpoint.best` so far
    is_best: bool = False
    wandb: str | None = None  # id of the wandb run
    best_metric: str | None = None  # the metric of `best`; None: `checkpoint.best`
    stop_metric: str | None = None  # the metric of `stop_best`; None: `train.stop_metric`
    stop_best: float | None = None  # highest `train.stop_metric` so far
    stop_waited: int = 0  # evaluations since then
    stopped: str | None = None  # why the run ended early
    flops: int = 0  # of all iterations of reinforcement learning
    is_evaluated: bool = True  # no evaluation was due, or it was done
    auto: dict[str, Any] = field(default_factory=dict)  # state of `algorithm.mc_samples=auto`
    # Digest of the run that has sampled the next iteration's rollouts; None: none are sampled.
    ahead: str | None = None

    @property
    def name(self) -> str:
        """Return the checkpoint's directory name, which sorts in order of time within a phase."""
        return f"{self.phase}-{self.iteration:06d}"


def latest_checkpoint(root: Path) -> tuple[Path, Progress] | None:
    """Return the newest checkpoint that looks whole, if there is one; no file is verified."""
    for path in checkpoints(root):
        if (path / PROGRESS_FILE).exists():
            return path, read_progress(path)
    return None


def checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints up to the one that `latest` names, newest first."""
    names, latest = _names(root), pointed(root, LATEST)
    if latest in names:
        names = names[names.index(latest) :]
    return [root / name for name in names]


def point(root: Path, pointer: str, name: str) -> None:
    """Make `latest` or `best` name a checkpoint, atomically."""
    write_whole(root / pointer, name)


def pointed(root: Path, pointer: str) -> str | None:
    """Return the name in a pointer file; None without the file."""
    path = root / pointer
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def set_aside(root: Path, path: Path, successor: Path | None) -> Path:
    """Rename a damaged checkpoint, and make `latest` name another; returns the new name."""
    target = root / f"{DAMAGED}{path.name}"
    target = path.rename(free_name(target) if target.exists() else target)
    if successor is None:
        (root / LATEST).unlink(missing_ok=True)
    else:
        point(root, LATEST, successor.name)
    return target


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
    """Return a checkpoint of a run: the latest, `best`, or by its name.

    Raises:
        ValueError: no such checkpoint; lists the existing ones.
    """
    root = run_dir / CHECKPOINTS
    names = sorted(_names(root))
    if name in (None, LATEST, BEST):
        if (found := pointed(root, name or LATEST)) is None:
            what = "best checkpoint" if name == BEST else "checkpoint"
            raise ValueError(f"{run_dir} holds no {what}; train it first")
        return root / found
    if name not in names:
        known = ", ".join(names) or "none yet"
        raise ValueError(f"{run_dir} holds no checkpoint {name}; it has {known}")
    return root / name


def _names(root: Path) -> list[str]:
    """Return the names of all checkpoints, newest first."""
    return [path.name for phase in PHASES for path in sorted(root.glob(f"{phase}-*"))][::-1]
