"""The run directory before a run: is it new, does it continue, or is it done?"""

from pathlib import Path

from agrpo_megatron.checkpoint.progress import CHECKPOINTS, Progress, latest_checkpoint
from agrpo_megatron.config import load, to_tree
from agrpo_megatron.settings import Settings
from agrpo_megatron.training.resolve import RUN_SETTINGS

# What may change between the attempts of one run: it alters no number, or only adds iterations.
MAY_CHANGE = ("run.dir", "run.threads", "run.timeout", "logging", "checkpoint", "parallel")
MAY_CHANGE += ("rollout", "ddp", "optimizer.distributed", "sft.optimizer.distributed")


def progress(settings: Settings) -> Progress | None:
    """Return how far the run directory has come; None for a new one.

    Raises:
        ValueError: it holds a run with other settings; names the first that differs.
    """
    directory = Path(settings.run.dir)
    found = latest_checkpoint(directory / CHECKPOINTS)
    if found is None:
        return None
    there = _flat(to_tree(load(Settings, directory / RUN_SETTINGS)))
    here = _flat(to_tree(settings))
    for key in [*here, *there]:
        allowed = any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)
        old, new = there.get(key), here.get(key)
        if not allowed and old != new:
            raise ValueError(
                f"run.dir={directory} holds a run with {key}={old}, not {new}; "
                "choose another run.dir, or move it away with --restart"
            )
    return found[1]


def is_finished(settings: Settings, done: Progress | None) -> bool:
    """Say whether nothing is left to do."""
    if done is None or done.phase != "rl":
        return False
    return done.iteration == settings.train.iterations or done.stopped is not None


def move_away(directory: Path) -> Path | None:
    """Rename a run directory to the first free `NAME.1`, `NAME.2`, ...; nothing is deleted."""
    if not directory.exists():
        return None
    number = 1
    while (target := directory.with_name(f"{directory.name}.{number}")).exists():
        number += 1
    return directory.rename(target)


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
