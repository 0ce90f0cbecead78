"""The time limit of each section of a run: as set, or learned from its longest time."""

import json
from pathlib import Path

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.resilience.exit_status import LAUNCH_FOLDER
from agrpo_megatron.runs.files import write_whole

LEARNED = "sections.json"  # in the folder `launch` of a run, read by its next attempt


class Limits:
    """The limits of one rank; equal on all ranks after the same sections.

    A section's learned limit holds in a phase once the section has ended in that phase: a
    supervised update says little about the time of a reinforcement-learning update.

    Args:
        world_size: times learned with another number of ranks are ignored.
        is_main: whether this rank saves the learned times with the run.
    """

    def __init__(self, settings: Settings, *, world_size: int, is_main: bool):
        self._settings, self._world_size, self._is_main = settings.resilience, world_size, is_main
        self._file = Path(settings.run.dir) / LAUNCH_FOLDER / LEARNED
        self._longest: dict[str, float] = {}
        self._seen: set[str] = set()
        self._read()

    def of(self, section: str, phase: str) -> float:
        """Return a section's limit in a phase, in seconds."""
        if section in self._settings.timeouts:
            return float(self._settings.timeouts[section])
        if section not in self._longest or f"{phase}/{section}" not in self._seen:
            return self._settings.first_timeout
        learned = self._settings.timeout_factor * self._longest[section]
        return max(self._settings.least_timeout, learned)

    @property
    def outside(self) -> float:
        """Return the limit between two sections, in seconds."""
        return self._settings.first_timeout

    def ended(self, section: str, phase: str) -> None:
        """Record that a section ended without an exception."""
        self._seen.add(f"{phase}/{section}")

    def learn(self, longest: dict[str, float]) -> None:
        """Update the limits.

        Args:
            longest: seconds of each section, the maximum over all ranks of this attempt.
        """
        # Earlier attempts may have taken longer: this one may have resumed inside a rollout.
        most = self._longest | {
            name: max(took, self._longest.get(name, 0.0)) for name, took in longest.items()
        }
        if most == self._longest:
            return
        self._longest = most
        if self._is_main:
            learned = {"world_size": self._world_size, "longest": most, "seen": sorted(self._seen)}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(learned, indent=1))

    def _read(self) -> None:
        try:
            learned = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no file yet, or a damaged one: learn again
            return
        if learned["world_size"] == self._world_size:
            self._longest, self._seen = learned["longest"], set(learned["seen"])
