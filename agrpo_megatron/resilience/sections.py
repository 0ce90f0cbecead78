"""What a rank is doing: the named parts of a run, timed, and watched by whoever wants to know."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

NAMES: tuple[str, ...] = ("setup", "rollout", "reward", "update", "checkpoint", "evaluation")


class Monitor(Protocol):
    """What is told of every section, on this rank."""

    def start(self, section: str, phase: str, iteration: int) -> None:
        """Hear that a section begins."""

    def end(self, section: str, *, is_whole: bool) -> None:
        """Hear that it ended; whole, or left by an exception."""

    def learn(self, longest: dict[str, float]) -> None:
        """Hear how long each section took at most, in seconds, on any rank so far."""

    def close(self) -> None:
        """Watch no longer."""


class Sections:
    """The sections of one rank; they follow each other, and none lies within another.

    Args:
        monitors: told in this order when a section begins, backwards when it ends.
    """

    def __init__(self, monitors: Sequence[Monitor] = ()):
        self._monitors = tuple(monitors)
        self._taken = dict.fromkeys(NAMES, 0.0)
        self.phase, self.iteration = "setup", 0  # under way; the loops count from 1
        self.longest: dict[str, float] = {}  # seconds of each whole section, on this rank

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Be in a section."""
        started, is_whole = time.perf_counter(), False
        try:
            for monitor in self._monitors:
                monitor.start(name, self.phase, self.iteration)
            yield
            is_whole = True
        finally:
            for monitor in reversed(self._monitors):
                monitor.end(name, is_whole=is_whole)
            seconds = time.perf_counter() - started
            self._taken[name] += seconds
            if is_whole:
                self.longest[name] = max(seconds, self.longest.get(name, 0.0))

    def at(self, phase: str, iteration: int) -> None:
        """Say which iteration is under way."""
        self.phase, self.iteration = phase, iteration

    def take(self) -> dict[str, float]:
        """Return the seconds in each section since the last call."""
        taken, self._taken = self._taken, dict.fromkeys(NAMES, 0.0)
        return taken

    def learn(self, longest: dict[str, float]) -> None:
        """Tell the monitors how long each section took at most, on any rank."""
        self.longest |= longest
        for monitor in self._monitors:
            monitor.learn(longest)

    def close(self) -> None:
        """Let nobody watch any longer."""
        for monitor in self._monitors:
            monitor.close()
