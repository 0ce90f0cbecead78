"""How long each section of a run may take: as set, or else learned from how long it took."""

import json
from pathlib import Path
from typing import Any

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.resilience.outcome import LAUNCH_FOLDER
from agrpo_megatron.resilience.sections import NAMES

LEARNED = "sections.json"  # in the folder `launch` of a run: what its next attempt begins with


class Limits:
    """The limits of one rank, the same on every rank that went through the same sections.

    A section's learned limit holds in a phase once the section has ended in it: an update of the
    supervised phase says little about one of the reinforcement learning.

    Args:
        world_size: what an attempt with another number of ranks learned is forgotten.
        is_main: keeps what is learned with the run.

    Raises:
        ValueError: `resilience.timeouts` is not seconds by section.
    """

    def __init__(self, settings: Settings, *, world_size: int, is_main: bool):
        self._settings, self._world_size, self._is_main = settings.resilience, world_size, is_main
        self._file = Path(settings.run.dir) / LAUNCH_FOLDER / LEARNED
        _check(self._settings.timeouts)
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
        """Return how long a run may be between two sections, in seconds."""
        return self._settings.first_timeout

    def ended(self, section: str, phase: str) -> None:
        """Hear that a section ended, whole."""
        self._seen.add(f"{phase}/{section}")

    def learn(self, longest: dict[str, float]) -> None:
        """Hear how long each section took at most on any rank of this attempt, in seconds."""
        # Earlier attempts may have taken longer: the first rollout of this one was in part kept.
        most = self._longest | {
            name: max(took, self._longest.get(name, 0.0)) for name, took in longest.items()
        }
        if most == self._longest:
            return
        self._longest = most
        if self._is_main:
            learned = {
                "world_size": self._world_size,
                "longest": self._longest,
                "seen": sorted(self._seen),
            }
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_suffix(".partial")
            partial.write_text(json.dumps(learned, indent=1), encoding="utf-8")
            partial.replace(self._file)

    def _read(self) -> None:
        try:
            learned = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or cut short as a disk ran full: learn anew
            return
        if learned["world_size"] == self._world_size:
            self._longest, self._seen = learned["longest"], set(learned["seen"])


def _check(timeouts: dict[str, Any]) -> None:
    for section, limit in timeouts.items():
        if section not in NAMES:
            fix = f"use {', '.join(NAMES)}"
            raise ValueError(f"resilience.timeouts.{section}={limit} names no section; {fix}")
        if not isinstance(limit, int | float) or not limit > 0:
            fix = "use a number of seconds"
            raise ValueError(f"resilience.timeouts.{section}={limit} is no time limit; {fix}")
