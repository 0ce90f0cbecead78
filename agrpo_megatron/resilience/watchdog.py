"""The built-in watchdog: find the rank that hangs, print its stack, and end the job.

Each rank has a thread that knows the open section and its limit. When a limit passes, that rank
prints its own stacks and asks all ranks, over the launcher's store, for the position of their main
threads. A rank in torch.distributed only waits for another rank. The hung rank is elsewhere, or
does not answer: it is stopped, holds Python's lock in native code, or is gone.
"""

import faulthandler
import itertools
import json
import linecache
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch.distributed as dist

from agrpo_megatron.resilience.failure import command, report_failure
from agrpo_megatron.resilience.limits import Limits
from agrpo_megatron.resilience.sections import Monitor
from agrpo_megatron.resilience.store import KEY_POLL, RankStore, say

LIMIT_POLL = 0.25  # seconds between two checks of the limit by the watching thread
REPLY_TIMEOUT = 5.0  # seconds for a rank to report its position
HARD_EXIT_DELAY = 12.0  # seconds after its limit at which a rank without a watching thread exits
SLACK = 1.0  # seconds by which the time of the hard exit may be off
ERRORS = 2  # file number of the error stream, since sys.stderr may be replaced
SHOWN_FRAMES = 12  # innermost frames that a report shows
SHOWN_RANKS = 8  # ranks that a report names
OUTSIDE = "no section"
ASKED, POSITIONS, PROCESS, REPORTED = "hang/asked", "hang/position", "hang/process", "hang/reported"


class Position(NamedTuple):
    """Where a rank's main thread is; JSON between ranks."""

    section: str
    waits: bool  # for other ranks
    stack: Sequence[str]  # innermost first

    @property
    def place(self) -> str:
        """Return the innermost frame."""
        return self.stack[0]


FINISHED = Position(OUTSIDE, waits=True, stack=("finished",))


@dataclass(frozen=True)
class _Open:
    """The open section of this rank, or the time between two sections."""

    section: str
    where: str  # phase and iteration
    started: float  # by the monotonic clock
    limit: float  # seconds

    @property
    def deadline(self) -> float:
        return self.started + self.limit

    def __str__(self) -> str:
        """Return its name in reports."""
        return f"section {self.section} ({self.where})" if self.where else self.section


class Watchdog(Monitor):
    """Watches the sections of this rank. Created in the thread that does the work.

    Args:
        ends: whether to end the job; if not, the watchdog only reports.
    """

    def __init__(self, limits: Limits, *, rank: int, ends: bool):
        self._limits, self._rank = limits, rank
        self._command = command()
        self._ends = ends and self._command is not None
        self._worker = threading.get_ident()
        self._phase = ""
        self._open = self._outside()
        if not faulthandler.is_enabled():  # a crash or SIGABRT prints the stacks
            faulthandler.enable(file=ERRORS)
        if self._store is not None:
            self._store.client.set(f"{PROCESS}/{rank}", json.dumps([_machine(), os.getpid()]))
        self._arm(self._open)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def start(self, section: str, phase: str, iteration: int) -> None:
        """Watch a section."""
        where = f"{phase} iteration {iteration}" if iteration else "before the first iteration"
        self._phase = phase
        now = time.monotonic()
        self._open = opened = _Open(section, where, now, self._limits.of(section, phase))
        # Restarting the hard exit's clock costs a thread, so a small change is ignored. The
        # watching thread does not suffice: this section's code may hold Python's lock.
        if abs(self._armed - opened.deadline - HARD_EXIT_DELAY) > SLACK:
            self._arm(opened)

    def end(self, section: str, *, is_whole: bool) -> None:
        """Stop watching a section."""
        if is_whole:
            self._limits.ended(section, self._phase)
        self._open = self._outside()

    def learn(self, longest: dict[str, float]) -> None:
        """Pass the longest times on to the limits."""
        self._limits.learn(longest)

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()  # never returns if the thread is ending the process
        faulthandler.cancel_dump_traceback_later()
        if self._store is not None:
            with suppress(dist.DistError):  # ranks that hang later still get an answer
                self._store.client.set(f"{POSITIONS}/{self._rank}", json.dumps(FINISHED))

    @property
    def _store(self) -> RankStore | None:
        return self._command.store if self._command is not None else None

    def _outside(self) -> _Open:
        return _Open(OUTSIDE, "", time.monotonic(), self._limits.outside)

    def _arm(self, opened: _Open) -> None:
        """Schedule the hard exit: a timer without Python's lock prints all stacks and exits."""
        self._armed = opened.deadline + HARD_EXIT_DELAY  # when it fires
        left = max(KEY_POLL, self._armed - time.monotonic())
        faulthandler.dump_traceback_later(left, exit=self._ends, file=ERRORS)

    def _watch(self) -> None:
        answered, armed = False, self._open
        while not self._over.wait(LIMIT_POLL):
            opened = self._open
            if time.monotonic() > opened.deadline:
                faulthandler.cancel_dump_traceback_later()
                self._diagnose(opened)
                return
            if opened is not armed:
                self._arm(opened)
                armed = opened
            with suppress(dist.DistError):  # the failure thread handles a lost store
                if not answered and self._store is not None and self._store.has(ASKED):
                    self._answer(self._store)
                    answered = True

    def _position(self) -> Position:
        return position_of(sys._current_frames()[self._worker], section=str(self._open))

    def _answer(self, store: RankStore) -> None:
        store.client.set(f"{POSITIONS}/{self._rank}", json.dumps(self._position()))

    def _diagnose(self, opened: _Open) -> None:
        """Print this rank's stacks, find the ranks that hang, and end the job."""
        took = time.monotonic() - opened.started
        over = f"has been open for {took:.1f} s, its limit is {opened.limit:.1f} s"
        say(f"rank {self._rank}: {opened} {over}")
        faulthandler.dump_traceback(file=ERRORS)
        store = self._store
        if store is None:
            hung, positions = [self._rank], {self._rank: self._position()}
        else:
            positions = self._positions(store)
            hung = hung_ranks(positions)
        failure, report = describe(hung, positions, asker=self._rank, section=str(opened))
        if self._command is not None and self._ends:
            is_first = report_failure(self._command, failure, report)
        else:
            is_first = store is None or store.client.add(REPORTED, 1) == 1
            if is_first:
                say(report)
        if is_first and store is not None:
            _abort_silent(store, [rank for rank in hung if positions[rank] is None])

    def _positions(self, store: RankStore) -> dict[int, Position | None]:
        """Return the position of every rank; None for a rank that does not answer."""
        keys = [f"{POSITIONS}/{rank}" for rank in range(store.world_size)]
        answers: list[str | None] = [None] * store.world_size
        with suppress(dist.DistError):
            store.client.set(ASKED, "")
            self._answer(store)
            deadline = time.monotonic() + REPLY_TIMEOUT
            while not store.client.check(keys) and time.monotonic() < deadline:
                time.sleep(KEY_POLL)
            answers = [store.value(key) for key in keys]
        positions = (Position(*json.loads(text)) if text else None for text in answers)
        return dict(enumerate(positions))


def _abort_silent(store: RankStore, silent: list[int]) -> None:
    """Abort the silent ranks on this machine, so that they print their stacks."""
    for rank in silent:
        owner = store.value(f"{PROCESS}/{rank}")
        machine, process = json.loads(owner) if owner else ("", 0)
        if machine == _machine():
            say(f"rank {rank}'s stacks:")
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGABRT)
                os.kill(process, signal.SIGCONT)


def _machine() -> str:
    """Return the scope in which process numbers are unique: a machine or a container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return f"unknown/{os.getpid()}"
    return f"{boot.read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"


def position_of(frame: FrameType, *, section: str) -> Position:
    """Return the position of a thread, given its innermost frame."""
    frames = itertools.islice(traceback.walk_stack(frame), SHOWN_FRAMES)
    stack = []
    for link, line in frames:
        place = "/".join(Path(link.f_code.co_filename).parts[-3:])
        stack.append(f"{place}:{line} {link.f_code.co_name}")
    return Position(section, _waits(frame), stack)


def hung_ranks(positions: Mapping[int, Position | None]) -> list[int]:
    """Return the ranks that hang: silent ranks, else ranks that do not wait for others.

    If several do not wait, return the ranks at the rarest place; if all wait, return none.
    """
    silent = [rank for rank, position in positions.items() if position is None]
    if silent:
        return silent
    busy = {rank: found.place for rank, found in positions.items() if found and not found.waits}
    counts = Counter(busy.values())
    fewest = min(counts.values(), default=0)
    return [rank for rank, place in busy.items() if counts[place] == fewest]


def describe(
    hung: list[int], positions: Mapping[int, Position | None], *, asker: int, section: str
) -> tuple[str, str]:
    """Return a summary in a few words, and the whole report.

    Args:
        section: the open section of the rank that asked.
    """
    if not hung:
        failure = f"all ranks wait for each other in {section} of rank {asker}"
        where = [f"  rank {rank}: {found.place}" for rank, found in positions.items() if found]
        causes = "a collective that they do not agree on, or a broken link?"
        return failure, "\n".join([f"{failure}: {causes}", *where[:SHOWN_RANKS]])
    first = positions[hung[0]]
    names = ", ".join(map(str, hung[:SHOWN_RANKS])) + (", ..." if len(hung) > SHOWN_RANKS else "")
    who = f"rank {names} hangs" if len(hung) == 1 else f"ranks {names} hang"
    if first is None:
        failure = f"{who} in {section} of rank {asker}, without an answer"
        causes = "stopped, holding Python's lock in native code, or its node is gone"
        return failure, f"{failure}: {causes}"
    failure = f"{who} in {first.section}, at {first.place}"
    stack = [f"  {place}" for place in first.stack]
    return failure, "\n".join([f"{who} in {first.section}; its stack, innermost first:", *stack])


def _waits(frame: FrameType) -> bool:
    """Return whether a frame waits for other ranks: in torch.distributed, or for its handle."""
    path = Path(frame.f_code.co_filename)
    if path.parent.name == "distributed" and path.parent.parent.name == "torch":
        return True
    return ".wait(" in linecache.getline(str(path), frame.f_lineno) and path.stem != "threading"
