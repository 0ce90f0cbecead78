"""A profile of some iterations: the operators of a rank, by section of the work."""

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.resilience.sections import Monitor

FOLDER = "profile"  # in a run directory
ROWS = 40  # of the table of operators
EVENTS = 200_000  # allocations in a snapshot of GPU memory


class Profiler(Monitor):
    """Records the sections in `profile.iterations` iterations from `profile.start` on.

    What follows an iteration, evaluation and saving, belongs to it. A run that ends within the
    window writes what it has.
    """

    def __init__(self, settings: Settings, *, rank: int):
        self._settings, self._rank = settings.profile, rank
        self._folder = Path(settings.run.dir) / FOLDER
        self._name = ""  # of the files; empty: nothing is recorded now
        self._trace: profile | None = None
        self._range: record_function | None = None

    def at(self, phase: str, iteration: int) -> None:
        """Begin or end the window where an iteration begins."""
        first = self._settings.start
        assert first is not None
        is_within = first <= iteration < first + self._settings.iterations
        is_within &= phase == self._settings.phase
        if self._name and not is_within:
            self._end()
        elif is_within and not self._name:
            self._name = f"{phase}-{iteration:06d}.rank{self._rank}"
            self._begin()

    def start(self, section: str, phase: str, iteration: int) -> None:
        """Begin the range of a section."""
        if not self._name:
            return
        if self._trace is None:
            torch.cuda.nvtx.range_push(section)
        else:
            self._range = record_function(section)
            self._range.__enter__()

    def end(self, section: str, *, is_whole: bool) -> None:
        """End the range of a section."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        elif self._name and self._trace is None:
            torch.cuda.nvtx.range_pop()

    def close(self) -> None:
        """Write the files of a window that the run's end cut short."""
        if self._name:
            self._end()

    def _begin(self) -> None:
        if self._settings.tool == "nsys":
            torch.cuda.profiler.start()
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            if self._settings.memory:
                torch.cuda.memory._record_memory_history(max_entries=EVENTS)
        self._trace = profile(activities=activities, profile_memory=self._settings.memory)
        self._trace.__enter__()

    def _end(self) -> None:
        name, self._name = self._name, ""
        if self._trace is None:
            torch.cuda.profiler.stop()
            return
        trace, self._trace = self._trace, None
        trace.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        on_gpu = torch.cuda.is_available()
        order = f"self_{'device' if on_gpu else 'cpu'}_time_total"
        table = trace.key_averages().table(sort_by=order, row_limit=ROWS)
        (self._folder / f"{name}.operators.txt").write_text(table, encoding="utf-8")
        if on_gpu and self._settings.memory:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)


def profilers(settings: Settings) -> list[Monitor]:
    """Return the profiler of this rank, if the settings want one.

    Raises:
        ValueError: `profile.tool=nsys` without a GPU.
    """
    wanted, rank = settings.profile, int(os.environ.get("RANK", "0"))
    if wanted.start is None or rank not in (wanted.ranks or [0]):
        return []
    if wanted.tool == "nsys" and not torch.cuda.is_available():
        raise ValueError("profile.tool=nsys needs a GPU, and torch sees none; use torch")
    return [Profiler(settings, rank=rank)]
