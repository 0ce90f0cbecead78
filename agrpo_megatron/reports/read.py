"""Read a run directory: settings, metrics and completion samples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agrpo_megatron.config.schema import describe, flatten
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.yaml_files import read_yaml
from agrpo_megatron.evaluation.statistics import Interval, wilson
from agrpo_megatron.reports.text import number
from agrpo_megatron.runs.history.changes import read_changes
from agrpo_megatron.runs.history.provenance import read_provenance
from agrpo_megatron.runs.log import TIMELINE

STAGES = ("before", "interval", "after")
TIME_PARTS = ("rollout", "reward", "update", "checkpoint")

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run directory holds; rows are in order of iteration, which counts within a phase."""

    path: Path
    settings: dict[str, Any]  # by dotted name, from config.yaml; empty if it is missing
    sft: tuple[Row, ...]
    rl: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    samples: tuple[Row, ...]
    changes: tuple[Row, ...]  # of settings, see `runs.history.changes`
    provenance: tuple[Row, ...]  # a row for each attempt, see `runs.history.provenance`
    unreadable_lines: int  # lines cut off by a crash or not of the expected form
    timeline: tuple[Row, ...] = ()  # of RL iterations, see `training.measures.timeline`


def read_run(path: Path) -> Run:
    """Read a run directory, whether the run has finished, is under way, or was cut off.

    Settings are taken as written, so that runs of other versions of the settings can be read.
    Where a resumed run repeats iterations, the rows it rolled back are left out.

    Raises:
        ValueError: the directory holds no metrics, or its config.yaml is not YAML.
    """
    file = path / "metrics.jsonl"
    if not file.is_file():
        what = "has no metrics.jsonl" if path.is_dir() else "does not exist"
        raise ValueError(f"run directory {path} {what}; give the run.dir of a run that has begun")
    metrics, broken_metrics = _read_lines(file)
    samples, broken_samples = _read_lines(path / "samples.jsonl")
    if not metrics:
        raise ValueError(f"{file} holds no metrics yet; wait for the first iteration")
    config, rl = path / "config.yaml", _of_phase(metrics, "rl")
    settings = read_yaml(config) if config.is_file() else {}
    return Run(
        path=path,
        settings=flatten(settings, whole={line.key for line in describe(Settings)}),
        sft=_of_phase(metrics, "sft"),
        rl=rl,
        evaluations=_of_phase(metrics, "eval"),
        samples=_distinct(samples),
        changes=tuple(read_changes(path)),
        provenance=tuple(read_provenance(path)),
        unreadable_lines=broken_metrics + broken_samples,
        timeline=_timeline(path, last=max((row["iteration"] for row in rl), default=0)),
    )


def series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (iterations, values) of one metric, both float [n], where it is present and finite."""
    pairs = [(row["iteration"], value) for row in rows if (value := number(row, key)) is not None]
    table = np.array(pairs, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def before(run: Run) -> Row | None:
    """Return the evaluation made before reinforcement learning, if there is one."""
    return next((row for row in _scored(run) if row.get("stage") == "before"), None)


def after(run: Run) -> Row | None:
    """Return the newest evaluation after training began, if there is one."""
    return next((row for row in _scored(run)[::-1] if row.get("stage") != "before"), None)


def _scored(run: Run) -> list[Row]:
    return [row for row in run.evaluations if "accuracy" in row]


def accuracy_interval(row: Row) -> Interval | None:
    """Return the 95% interval of an evaluation's accuracy: as logged, or Wilson's of its count."""
    low, high = number(row, "accuracy_low"), number(row, "accuracy_high")
    if low is not None and high is not None:
        return low, high
    share, count = number(row, "accuracy"), number(row, "problems")
    return wilson(share, int(count)) if share is not None and count else None


def time_shares(row: Row) -> dict[str, float]:
    """Return seconds of an RL iteration by part; `other` is the remainder."""
    shares = {part: number(row, f"timing/{part}") or 0.0 for part in TIME_PARTS}
    whole = number(row, "timing/iteration") or 0.0
    return shares | {"other": max(0.0, whole - sum(shares.values()))}


def time_totals(run: Run) -> dict[str, float]:
    """Return seconds of the whole run by part, supervised phase and evaluations included."""
    shares = [time_shares(row) for row in run.rl]
    return {
        "supervised": float(series(run.sft, "timing/iteration")[1].sum()),
        **{part: sum(s[part] for s in shares) for part in (*TIME_PARTS, "other")},
        "evaluation": sum(
            float(series(rows, "timing/evaluation")[1].sum()) for rows in (run.sft, run.evaluations)
        ),
    }


def ratio_alarm(run: Run) -> float | None:
    """Return the level of the ratio's alarm; None if unknown, or for a run of replayed rollouts."""
    is_replay = run.settings.get("train.from_rollouts") is not None
    return None if is_replay else number(run.settings, "train.ratio_alarm")


def smooth(values: np.ndarray) -> np.ndarray:
    """Return a Gaussian-weighted running mean [n]; its width is a fortieth of the points."""
    if len(values) < 8:
        return values
    width = max(1.0, len(values) / 40)
    reach = int(4 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    total = np.convolve(values, kernel)[reach : reach + len(values)]
    return total / np.convolve(np.ones(len(values)), kernel)[reach : reach + len(values)]


def _read_lines(path: Path) -> tuple[list[Row], int]:
    """Return the JSON objects that have a phase and an iteration, and how many lines do not."""
    if not path.is_file():
        return [], 0
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.split("\n") if line.strip()]
    rows = [row for line in lines if (row := _parse(line))]
    return rows, len(lines) - len(rows)


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_row = isinstance(row, dict) and "phase" in row and isinstance(row.get("iteration"), int)
    return row if is_row else None


def _of_phase(metrics: Sequence[Row], phase: str) -> tuple[Row, ...]:
    """Return the rows of a phase; a row replaces earlier rows of its own or a later iteration."""
    rows = [row for row in metrics if row["phase"] == phase]
    kept: list[Row] = []
    for row in rows:
        while kept and _order(kept[-1]) >= _order(row):
            kept.pop()
        kept.append(row)
    return tuple(kept)


def _order(row: Row) -> tuple[int, int]:
    stage = row.get("stage")
    return row["iteration"], STAGES.index(stage) if stage in STAGES else 1


def _timeline(path: Path, *, last: int) -> tuple[Row, ...]:
    """Return the parts of RL iterations up to the last one; of an iteration, the newest line."""
    lines = _of_phase(_read_lines(path / TIMELINE)[0], "rl")
    return tuple(line for line in lines if line["iteration"] <= last and line.get("ranks"))


def _distinct(samples: Sequence[Row]) -> tuple[Row, ...]:
    """Return samples with a step for every piece; of duplicates, the newest."""
    keys = ("phase", "iteration", "prompt", "completion")
    kept: dict[tuple[str, ...], Row] = {}
    for sample in samples:
        pieces, steps = sample.get("pieces"), sample.get("unmask_step")
        if isinstance(pieces, list) and isinstance(steps, list) and len(pieces) == len(steps):
            kept[tuple(str(sample.get(key)) for key in keys)] = sample
    return tuple(kept.values())
