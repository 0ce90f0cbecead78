"""Run tasks one after the other in a set of processes, and survive the tasks that end them.

The processes append a line of JSON for each finished task to a file. If one of them dies, or a
task takes too long, that task has failed; new processes run the tasks after it.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

START = 60.0  # seconds that processes need before their first task
END = 10.0  # seconds that they get to end after their last one
LEAST = 15.0  # seconds; nothing is started with less time left
POLL = 0.05  # seconds
NO_TIME = "cut: no time was left"

Result = dict[str, Any]
Start = Callable[[list[str], Path], Sequence[subprocess.Popen]]


class Task(Protocol):
    """A task of the processes."""

    @property
    def name(self) -> str:
        """Return its name."""
        ...

    @property
    def seconds(self) -> float:
        """Return its limit."""
        ...


def run_tasks(
    tasks: Sequence[Task], start: Start, *, left: Callable[[], float], log: str, patience: float = 1
) -> Iterator[tuple[str, Result]]:
    """Run tasks in order; yield the name and the result of each as it ends.

    A task without a result yields `failed`, or `cut` where `left` ran out, with the reason.

    Args:
        start: starts processes for tasks, by name; they write results to the given file, with
            `append_result`. Each leads a session, with its children.
        left: returns the seconds that remain for everything.
        log: the file of the processes' output, for messages.
        patience: factor of all limits but `left`.
    """
    waiting = list(tasks)
    while waiting:
        if left() < LEAST:
            yield from ((task.name, {"cut": NO_TIME}) for task in waiting)
            return
        for name, result in _in_one_set(list(waiting), start, left, log, patience):
            waiting.pop(0)
            yield name, result


def append_result(results: Path, name: str, result: Result) -> None:
    """Append the result of a task; called by one of its processes."""
    with results.open("a") as file:
        file.write(json.dumps({"name": name, "result": result}) + "\n")


def _in_one_set(
    tasks: Sequence[Task], start: Start, left: Callable[[], float], log: str, patience: float
) -> Iterator[tuple[str, Result]]:
    """Run tasks in one set of processes; the first without a result is the last yielded."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        results = Path(folder) / "results"
        results.touch()
        processes, is_done = start([task.name for task in tasks], results), False
        try:
            yield from _follow(tasks, processes, results, left, log, patience)
            is_done = len(_read(results)) == len(tasks)
        finally:
            _end(processes, END if is_done else 0.0)


def _follow(
    tasks: Sequence[Task],
    processes: Sequence[subprocess.Popen],
    results: Path,
    left: Callable[[], float],
    log: str,
    patience: float,
) -> Iterator[tuple[str, Result]]:
    """Yield results as they come, until all are there or a task failed."""
    done, begun = 0, time.monotonic()
    own = patience * (START + tasks[0].seconds)
    while done < len(tasks):
        ended = _ended(processes)  # before the results are read, so that none is missed
        found = _read(results)[done:]
        for line in found:
            yield line["name"], line["result"]
        if found:
            done, begun = done + len(found), time.monotonic()
            own = patience * tasks[done].seconds if done < len(tasks) else 0.0
            continue
        name, spent = tasks[done].name, time.monotonic() - begun
        if ended is not None:
            yield name, {"failed": f"{ended}; see {log}"}
            return
        if spent > own:
            yield name, {"failed": f"hangs or is far too slow: not done in {own:.0f} s; see {log}"}
            return
        if left() < 0:
            yield name, {"cut": NO_TIME}
            return
        time.sleep(POLL)


def _read(results: Path) -> list[dict[str, Any]]:
    text = results.read_text()
    whole = text[: text.rfind("\n") + 1]  # the last line may be half written
    return [json.loads(line) for line in whole.splitlines()]


def _ended(processes: Sequence[subprocess.Popen]) -> str | None:
    """Return how a process failed, or that all ended; None while they run."""
    statuses = [process.poll() for process in processes]
    for rank, status in enumerate(statuses):
        if status:
            which = f"rank {rank} " if len(statuses) > 1 else ""
            return f"{which}failed with status {status}"
    return "ended without a result" if all(status == 0 for status in statuses) else None


def _end(processes: Sequence[subprocess.Popen], patience: float) -> None:
    """Wait for the processes to end; then kill them with their children."""
    deadline = time.monotonic() + patience
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
