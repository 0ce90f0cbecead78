"""The files of a run: metrics, samples, resolved settings; and the trackers of its metrics."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agrpo_megatron.config.schema import to_whole_yaml
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.files import append_records, check_folder, read_records, write_whole
from agrpo_megatron.runs.trackers.tensorboard import TensorBoard, wants_tensorboard
from agrpo_megatron.runs.trackers.weights_and_biases import Wandb, check_wandb

METRICS, SAMPLES, NOTES = "metrics.jsonl", "samples.jsonl", "notes.txt"
TIMELINE = "timeline.jsonl"  # when the parts of iterations began and ended
SECONDS = "totals/seconds"  # a metric of every line


def check_log(settings: Settings) -> None:
    """Check, before any rank starts, that a run can write its folder and log in to wandb.

    Raises:
        ValueError: it cannot.
    """
    check_folder(Path(settings.run.dir), key="run.dir")
    check_wandb(settings)
    wants_tensorboard(settings)


def seconds_so_far(directory: Path) -> float:
    """Return the seconds of a run's attempts up to their last lines of metrics; 0 without any."""
    return (_last_line(directory / METRICS) or {}).get(SECONDS, 0.0)


class RunLog:
    """Append-only logs of a run, written by the main rank; calls on other ranks do nothing.

    A checkpoint records the lengths of the files. A resumed run truncates the files to them, so
    no iteration is logged twice.

    Args:
        started: when this attempt began, by `time.monotonic`; None: now.
        check: called before anything is written; raises if this attempt must not write.
    """

    def __init__(
        self,
        directory: Path,
        *,
        settings: Settings,
        is_main: bool,
        wandb_id: str | None = None,
        started: float | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.directory, self.check = directory, check
        self._files: dict[str, Any] = {}
        self._wandb: Wandb | None = None
        self._trackers: list[Wandb | TensorBoard] = []
        self._lines = 0  # of metrics
        self._started = time.monotonic() if started is None else started
        if not is_main:
            return
        directory.mkdir(parents=True, exist_ok=True)
        # Before the file is cut back: iterations that are lost took time as well.
        self._started -= seconds_so_far(directory)
        for name in (METRICS, SAMPLES):
            self._files[name] = (directory / name).open("a", encoding="utf-8")
        write_whole(directory / "config.yaml", to_whole_yaml(settings))
        if settings.logging.wandb != "disabled":
            self._wandb = Wandb(directory, settings, known=wandb_id)
            self._trackers.append(self._wandb)
        if wants_tensorboard(settings):
            self._trackers.append(TensorBoard(directory))

    def metrics(self, record: dict[str, Any]) -> None:
        """Write one line of metrics, and send it to wandb and TensorBoard.

        The seconds of this attempt and of earlier ones up to their last line are added.
        """
        record = {**record, SECONDS: time.monotonic() - self._started}
        self._append(METRICS, record)
        for tracker in self._trackers:
            tracker.send(self._lines, record)
        self._lines += 1

    def first_values(self, phase: str, key: str, *, iterations: int) -> dict[int, float]:
        """Return a metric of a phase's first iterations, as logged; empty on other ranks."""
        found: dict[int, float] = {}
        if not self._files or not iterations:
            return found
        for record in read_records(self.directory / METRICS):
            if record["phase"] == phase and record["iteration"] <= iterations:
                found[record["iteration"]] = record[key]
        return found

    def last(self, phase: str) -> dict[str, Any]:
        """Return the last line of metrics of a phase; empty without one, and on other ranks."""
        return (_last_line(self.directory / METRICS, phase) if self._files else None) or {}

    def samples(self, records: list[dict[str, Any]], **common: Any) -> None:
        """Write completion samples, one line each."""
        for record in records:
            self._append(SAMPLES, {**common, **record})

    def timeline(self, record: dict[str, Any]) -> None:
        """Write a line of the timeline; a resumed run appends, and later lines count."""
        if self._files:
            self.check()
            append_records(self.directory / TIMELINE, [record])

    def notes(self, lines: Sequence[str]) -> None:
        """Write notes on the run's problems; each attempt replaces the file."""
        if self._files and lines:
            (self.directory / NOTES).write_text("\n".join([*lines, ""]), encoding="utf-8")

    def alert(self, title: str, text: str) -> None:
        """Send an alert through wandb."""
        for tracker in self._trackers:
            tracker.alert(title, text)

    @property
    def wandb_id(self) -> str | None:
        """Return the wandb run's id; None if wandb is off, and on other ranks."""
        return self._wandb.id if self._wandb is not None else None

    def offsets(self) -> dict[str, int]:
        """Return the length of each file, in bytes."""
        return {name: file.tell() for name, file in self._files.items()}

    def cut_back(self, offsets: dict[str, int]) -> None:
        """Truncate the files to their lengths at a checkpoint."""
        for name, file in self._files.items():
            file.truncate(min(offsets.get(name, 0), file.seek(0, os.SEEK_END)))
            file.seek(0, os.SEEK_END)
        if self._trackers:
            kept = read_records(self.directory / METRICS)
            self._lines = len(kept)
            for tracker in self._trackers:
                tracker.restart(kept)

    def close(self) -> None:
        """Close the files and the trackers."""
        for file in (*self._files.values(), *self._trackers):
            file.close()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if name in self._files:
            self.check()
            self._files[name].write(json.dumps(record) + "\n")
            self._files[name].flush()


def _last_line(path: Path, phase: str | None = None) -> dict[str, Any] | None:
    """Return the last whole line of metrics, of one phase if it is given; None without one."""
    records = reversed(read_records(path))
    return next((record for record in records if phase in (None, record["phase"])), None)
