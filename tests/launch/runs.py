"""Run directories as training leaves them, made from records alone."""

import json
from dataclasses import asdict
from pathlib import Path

from agrpo_megatron.config.schema import load, to_yaml
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.progress import (
    CHECKPOINTS,
    LATEST,
    PROGRESS_FILE,
    RUN_SETTINGS,
    Progress,
    point,
)
from agrpo_megatron.runs.resolve import resolve


def leave_run(file, overrides, *, iteration, accuracies=()):
    """Leave a run behind that was saved after an RL iteration, with so many evaluations."""
    settings = resolve(load(Settings, file, overrides), world_size=1).settings
    directory, progress = Path(settings.run.dir), Progress("rl", iteration, {})
    checkpoint = directory / CHECKPOINTS / progress.name
    checkpoint.mkdir(parents=True)
    (directory / RUN_SETTINGS).write_text(to_yaml(settings))
    (checkpoint / PROGRESS_FILE).write_text(json.dumps(asdict(progress)))
    point(checkpoint.parent, LATEST, progress.name)
    rows = [
        {
            "phase": "eval",
            "stage": "interval" if number else "before",
            "iteration": number,
            "accuracy": accuracy,
            "accuracy_low": accuracy - 0.1,
            "accuracy_high": accuracy + 0.1,
        }
        for number, accuracy in enumerate(accuracies)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
