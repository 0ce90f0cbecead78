"""The base of adapters, as their checkpoints name it; reads small files, needs no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from agrpo_megatron.runs.progress import BASE_FILE


@dataclass(frozen=True)
class Base:
    """The frozen weights of a run."""

    load: str | None  # a Hugging Face directory or a checkpoint; None: random weights
    seed: int  # of random weights
    digest: str | None  # SHA-256 of the SHA-256 of its files; None: random weights


def read_base(checkpoint: Path) -> Base:
    """Read the base of a checkpoint of adapters.

    Raises:
        ValueError: the file is damaged.
    """
    path = checkpoint / BASE_FILE
    try:
        return Base(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: does not name the base of adapters ({error})") from None


def write_base(folder: Path, base: Base) -> None:
    """Write the file that names the base; one rank."""
    text = json.dumps(asdict(base), indent=1) + "\n"
    (folder / BASE_FILE).write_text(text, encoding="utf-8")


def check_base(checkpoint: Path, found: Base) -> None:
    """Check that the adapters of a checkpoint belong to a base.

    Raises:
        ValueError: they were trained on another one.
    """
    trained = read_base(checkpoint)
    same = (trained.digest, trained.load is None) == (found.digest, found.load is None)
    if not same or (trained.digest is None and trained.seed != found.seed):
        raise ValueError(
            f"{checkpoint}: its adapters were trained on {_named(trained)}, and the base is now "
            f"{_named(found)}; restore the base, or set model.load to it"
        )


def _named(base: Base) -> str:
    if base.digest is None:
        return f"random weights of seed {base.seed}"
    return f"{base.load} (SHA-256 {base.digest[:12]})"
