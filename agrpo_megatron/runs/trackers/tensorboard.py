"""Metrics as TensorBoard's event files; needs the package `tensorboard`, not torch or TensorFlow.

Each phase has its own folder, which TensorBoard shows as a run: so a step is an iteration of its
phase, and a resume can drop the steps of one phase that a checkpoint does not include.
"""

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.trackers import named_scalars

FOLDER = "tensorboard"  # in a run directory
INSTALL = "pip install 'agrpo-megatron[tensorboard]'"


def wants_tensorboard(settings: Settings) -> bool:
    """Return whether a run writes event files; `auto` does where the package is installed.

    Raises:
        ValueError: `logging.tensorboard` is true, and the package is missing.
    """
    wanted = settings.logging.tensorboard
    is_there = importlib.util.find_spec("tensorboard") is not None
    if wanted is True and not is_there:
        raise ValueError(
            "logging.tensorboard=true needs the package tensorboard, which is not installed; "
            f"{INSTALL}, or use logging.tensorboard=auto"
        )
    return is_there if wanted == "auto" else bool(wanted)


class TensorBoard:
    """The event files of an attempt; each attempt adds files to its run's."""

    def __init__(self, directory: Path):
        self._folder = directory / FOLDER
        self._writers: dict[str, Any] = {}
        self._steps: dict[str, int] = {}  # the last one of each phase

    def restart(self, kept: Sequence[dict[str, Any]]) -> None:
        """Begin after the lines that a resume keeps: readers drop the steps beyond them.

        A phase without event files gets all of its lines.
        """
        self.close()
        self._steps = {record["phase"]: record["iteration"] for record in kept}
        for phase in {path.name for path in self._folder.glob("*")} | self._steps.keys():
            folder = self._folder / phase
            if any(folder.glob("events.*")):
                self._open(phase, purge_step=self._steps.get(phase, -1) + 1)
                continue
            self._steps.pop(phase, None)
            for record in kept:
                if record["phase"] == phase:
                    self.send(0, record)

    def send(self, _index: int, record: dict[str, Any]) -> None:
        """Write a line; of two lines of a step the first counts."""
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        phase, step = record["phase"], record["iteration"]
        if step <= self._steps.get(phase, -1):
            return
        self._steps[phase] = step
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in named_scalars(record).items()
            if isinstance(value, int | float)
        ]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=values))
        writer = self._writers.get(phase) or self._open(phase)
        writer.add_event(event)
        writer.flush()  # a kill loses no step

    def alert(self, title: str, text: str) -> None:
        """Do nothing: event files have no alerts."""

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _open(self, phase: str, *, purge_step: int | None = None) -> Any:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if purge_step is not None:  # readers order files by the second in their names
            while any(self._folder.glob(f"{phase}/events.out.tfevents.{int(time.time())}.*")):
                time.sleep(0.05)
        writer = self._writers[phase] = EventFileWriter(str(self._folder / phase))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            writer.add_event(Event(step=purge_step, wall_time=time.time(), session_log=start))
            writer.flush()  # a reader has to see it before the next step comes
        return writer
