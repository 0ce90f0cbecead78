"""Injected faults, for tests: at a named section and iteration, once over all attempts.

    AGRPO_FAULTS="kill:rank=1,section=rollout,iteration=3; fail_save:rank=0,iteration=4"
    AGRPO_FAULTS_DIR=folder, shared by all ranks and attempts; each strike leaves a file there

A run loads this file only if AGRPO_FAULTS is set (agrpo_megatron/resilience/monitors.py).
docs/reliability.md lists the kinds and their options.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from agrpo_megatron.resilience.exit_status import LAUNCHERS
from agrpo_megatron.resilience.sections import NAMES, Monitor

FAULTS, FOLDER = "AGRPO_FAULTS", "AGRPO_FAULTS_DIR"
NODE = ("SLURM_JOB_ID", "SLURMD_NODENAME")
OPTIONS: dict[str, Callable[[str], Any]] = {
    "rank": int,
    "section": str,
    "phase": str,
    "iteration": int,
    "times": int,
    "after": float,
    "seconds": float,
    "at": float,
}
CHOICES = {"section": NAMES, "phase": ("sft", "rl")}


@dataclass(frozen=True)
class Fault:
    """One fault of AGRPO_FAULTS."""

    number: int  # its position in the text, from 1
    kind: str
    rank: int
    section: str
    phase: str = "rl"  # ignored in setup, which precedes both phases
    iteration: int | None = None  # None: any
    times: int = 1  # number of strikes over all attempts; `slow` strikes every time
    after: float = 0.0  # seconds into the section
    seconds: float = 0.0  # of the sleep of `slow`
    at: float = 0.0  # seconds since the epoch; no strike before

    def is_due(self, section: str, phase: str, iteration: int) -> bool:
        """Return whether it strikes in a section that begins."""
        if section != self.section or self.iteration not in (None, iteration):
            return False
        if time.time() < self.at:
            return False
        return section == "setup" or phase == self.phase


class Faults(Monitor):
    """The faults of one rank. They strike in `start`, or later from a thread."""

    def __init__(self, faults: tuple[Fault, ...], folder: Path):
        self._faults, self._folder = faults, folder
        self._timers: list[threading.Timer] = []

    @classmethod
    def from_environment(cls, rank: int) -> "Faults":
        """Read this rank's faults.

        Raises:
            ValueError: AGRPO_FAULTS is malformed, or AGRPO_FAULTS_DIR is not set.
        """
        faults = parse_faults(os.environ.get(FAULTS, ""))
        folder = os.environ.get(FOLDER)
        if faults and not folder:
            raise ValueError(f"{FAULTS} needs {FOLDER}; set it to a folder that all ranks share")
        return cls(tuple(fault for fault in faults if fault.rank == rank), Path(folder or "."))

    def start(self, section: str, phase: str, iteration: int) -> None:
        """Strike with every fault that is due.

        Raises:
            RuntimeError: `raise` struck.
            OSError: `fail_save` struck.
        """
        for fault in self._faults:
            if not fault.is_due(section, phase, iteration):
                continue
            if fault.after:
                timer = threading.Timer(fault.after, self._strike, (fault, phase, iteration))
                timer.daemon = True
                timer.start()
                self._timers.append(timer)
            else:
                self._strike(fault, phase, iteration)

    def end(self, section: str, *, is_whole: bool) -> None:
        """Cancel the faults that would strike later in the section."""
        self.close()

    def close(self) -> None:
        """Cancel all pending faults."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _strike(self, fault: Fault, phase: str, iteration: int) -> None:
        if fault.kind != "slow" and not _claim(fault, self._folder):
            return
        where = f"rank {fault.rank}, section {fault.section}, {phase} iteration {iteration}"
        print(f"fault {fault.kind}: {where}", file=sys.stderr, flush=True)
        STRIKES[fault.kind](fault)


def parse_faults(text: str) -> list[Fault]:
    """Read the faults of all ranks.

    Raises:
        ValueError: a part is malformed.
    """
    parts = [part.strip() for part in text.split(";")]
    return [_fault(number, part) for number, part in enumerate(filter(None, parts), start=1)]


def _fault(number: int, part: str) -> Fault:
    kind, _, rest = part.partition(":")
    kind = kind.strip()
    if kind not in STRIKES:
        raise _malformed(part, f"{kind!r} is not a kind of fault", ", ".join(STRIKES))
    options: dict[str, Any] = {}
    for word in filter(None, map(str.strip, rest.split(","))):
        key, _, value = word.partition("=")
        if key not in OPTIONS:
            raise _malformed(part, f"{key!r} is not an option", ", ".join(OPTIONS))
        options[key] = _value(part, key, value)
    if kind == "fail_save":
        options.setdefault("section", "checkpoint")
    _check(part, kind, options)
    return Fault(number, kind, **options)


def _value(part: str, key: str, text: str) -> Any:
    try:
        value = OPTIONS[key](text)
    except ValueError:
        raise _malformed(part, f"{key}={text} is not a number", f"{key}=1") from None
    if key in CHOICES and value not in CHOICES[key]:
        raise _malformed(part, f"there is no {key} {text!r}", ", ".join(CHOICES[key]))
    least = 1 if key == "times" else 0
    if key not in CHOICES and not least <= value < float("inf"):
        raise _malformed(part, f"{key}={text} is out of range", f"{key}={least} or more")
    return value


def _check(part: str, kind: str, options: dict[str, Any]) -> None:
    """Raise for options that are missing or that the kind does not take."""
    for key in ("rank", "section"):
        if key not in options:
            raise _malformed(part, f"it has no {key}", f"{key}=...")
    if kind == "slow" and "seconds" not in options:
        raise _malformed(part, "seconds are missing", "seconds=...")
    if kind != "slow" and "seconds" in options:
        raise _malformed(part, "only slow takes seconds", "after=... for a later strike")
    if kind == "fail_save" and options["section"] != "checkpoint":
        raise _malformed(part, "no save happens there", "section=checkpoint")
    if "after" in options and kind not in LATER:
        later = ", ".join(LATER)
        raise _malformed(part, f"{kind} strikes as its section begins", f"after=... with {later}")


def _malformed(part: str, rule: str, fix: str) -> ValueError:
    return ValueError(f"{FAULTS}: in {part!r}, {rule}; use {fix}")


def _claim(fault: Fault, folder: Path) -> bool:
    """Record a strike; returns False if the fault has struck often enough."""
    folder.mkdir(parents=True, exist_ok=True)
    for strike in range(1, fault.times + 1):
        name = f"{fault.number:03d}-{fault.kind}-rank{fault.rank}-{fault.section}-{strike}"
        with contextlib.suppress(FileExistsError):
            os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return True
    return False


def _kill(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(_: Fault) -> None:
    while True:
        time.sleep(3600)


def _raise(_: Fault) -> None:
    raise RuntimeError("injected fault")


def _slow(fault: Fault) -> None:
    time.sleep(fault.seconds)


def _stop(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def _fail_save(_: Fault) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _lose_node(_: Fault) -> None:
    """Kill all processes of the job on this node, the launcher first and this process last."""
    for process in (process for process in _of_this_node() if process.pid != os.getpid()):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _of_this_node() -> list[psutil.Process]:
    """Return the job's processes on this node; without SLURM, the launcher and its children."""
    node = {key: os.environ[key] for key in NODE if key in os.environ}
    if len(node) == len(NODE):
        running = sorted(psutil.process_iter(), key=lambda process: process.pid)
        return [process for process in running if node.items() <= _environment(process).items()]
    if not any(key in os.environ for key in LAUNCHERS):
        return []
    launcher = psutil.Process(os.getppid())
    return [launcher, *launcher.children(recursive=True)]


def _environment(process: psutil.Process) -> dict[str, str]:
    """Return a process's environment; empty if this process may not read it."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


STRIKES: dict[str, Callable[[Fault], None]] = {
    "kill": _kill,
    "hang": _hang,
    "raise": _raise,
    "slow": _slow,
    "stop": _stop,
    "fail_save": _fail_save,
    "lose_node": _lose_node,
}
LATER = ("kill", "stop", "lose_node")  # may strike from another thread
