"""The sections of a run on one rank: named phases of the work, timed and monitored."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from agrpo_megatron.config.settings.resilience import SECTIONS as NAMES


class Monitor:
    """An observer of every section of this rank; each method does nothing here."""

    def at(self, phase: str, iteration: int) -> None:
        """Handle the start of an iteration."""

    def start(self, section: str, phase: str, iteration: int) -> None:
        """Handle the start of a section."""

    def end(self, section: str, *, is_whole: bool) -> None:
        """Handle the end of a section; `is_whole` is False after an exception."""

    def learn(self, longest: dict[str, float]) -> None:
        """Handle the longest time of each section over all ranks so far, in seconds."""

    def close(self) -> None:
        """Stop monitoring."""


class Sections:
    """The sections of one rank, one after another and never nested.

    Args:
        monitors: called in this order when a section begins, in reverse when it ends.
    """

    def __init__(self, monitors: Sequence[Monitor] = ()):
        self._monitors = tuple(monitors)
        self._taken = dict.fromkeys(NAMES, 0.0)
        self.phase, self.iteration = "setup", 0  # the current ones; the loops count from 1
        self.longest: dict[str, float] = {}  # seconds of each whole section, on this rank
        # Begin and end of sections, and of parts of them, in this iteration: seconds since 1970.
        self.spans: list[tuple[str, float, float]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run the body as a section."""
        started, is_whole = time.perf_counter(), False
        try:
            for monitor in self._monitors:
                monitor.start(name, self.phase, self.iteration)
            with self.timed(name):
                yield
            is_whole = True
        finally:
            for monitor in reversed(self._monitors):
                monitor.end(name, is_whole=is_whole)
            seconds = time.perf_counter() - started
            self._taken[name] += seconds
            if is_whole:
                self.longest[name] = max(seconds, self.longest.get(name, 0.0))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Note when the body began and ended; it may be a part of a section."""
        started = time.time()
        try:
            yield
        finally:
            self.spans.append((part, started, time.time()))

    def at(self, phase: str, iteration: int) -> None:
        """Set the current phase and iteration."""
        self.phase, self.iteration, self.spans = phase, iteration, []
        for monitor in self._monitors:
            monitor.at(phase, iteration)

    def take(self) -> dict[str, float]:
        """Return the seconds in each section since the last call."""
        taken, self._taken = self._taken, dict.fromkeys(NAMES, 0.0)
        return taken

    def learn(self, longest: dict[str, float]) -> None:
        """Pass the longest time of each section over all ranks to the monitors."""
        self.longest |= longest
        for monitor in self._monitors:
            monitor.learn(longest)

    def close(self) -> None:
        """Stop all monitors."""
        for monitor in self._monitors:
            monitor.close()
