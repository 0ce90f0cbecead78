"""The built-in watchdog: a rank that hangs is found, named with its stack, and the job ended.

Each rank has a thread that knows the open section and its limit. When a limit has passed on some
rank, it prints its own stacks and asks all ranks, over the launcher's store, where they stand.
A rank whose main thread is in torch.distributed only waits for another. The one that is elsewhere
hangs, or the one that does not answer: stopped, holding Python's lock in native code, or gone.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from agrpo_megatron.resilience.board import STEP, Board, say
from agrpo_megatron.resilience.failure import accuse, command
from agrpo_megatron.resilience.limits import Limits
from agrpo_megatron.resilience.suspects import Stand, culprits, describe, stand_of

POLL = 0.25  # seconds between two looks of the watching thread
PATIENCE = 5.0  # seconds that a rank has to say where it stands
MARGIN = 12.0  # seconds after its limit at which a rank ends that cannot run its watching thread
SLACK = 1.0  # seconds by which that may be off
ERRORS = 2  # the error stream's number: Python's object may be another by then
OUTSIDE = "no section"
AT_ITS_END = Stand("no section", waits=True, stack=("at its end",))
ASKED, STANDS, HOME, REPORTED = "hang/asked", "hang/stands", "hang/home", "hang/reported"


@dataclass(frozen=True)
class _Open:
    """The section that is open on this rank, or that none is."""

    section: str
    where: str  # phase and iteration
    started: float  # by the clock that no correction of the time moves
    limit: float  # seconds

    @property
    def deadline(self) -> float:
        return self.started + self.limit

    def __str__(self) -> str:
        """Name it as reports do."""
        return f"section {self.section} ({self.where})" if self.where else self.section


class Watchdog:
    """Watches the sections of this rank; a Monitor. Made in the thread that does the work.

    Args:
        ends: whether to end the job; otherwise somebody else will, and this only tells.
    """

    def __init__(self, limits: Limits, *, rank: int, ends: bool):
        self._limits, self._rank = limits, rank
        self._command = command()
        self._ends = ends and self._command is not None
        self._worker = threading.get_ident()
        self._phase = ""
        self._open = self._outside()
        if not faulthandler.is_enabled():  # a rank that crashes, or is told to, shows its stacks
            faulthandler.enable(file=ERRORS)
        if self._board is not None:
            self._board.store.set(f"{HOME}/{rank}", json.dumps([_machine(), os.getpid()]))
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
        # Starting the last resort's clock anew costs a thread, so not for next to nothing. The
        # watching thread cannot be relied on: this section's code may hold Python's lock.
        if abs(self._armed - opened.deadline - MARGIN) > SLACK:
            self._arm(opened)

    def end(self, section: str, *, is_whole: bool) -> None:
        """Watch it no longer."""
        if is_whole:
            self._limits.ended(section, self._phase)
        self._open = self._outside()

    def learn(self, longest: dict[str, float]) -> None:
        """Learn limits."""
        self._limits.learn(longest)

    def close(self) -> None:
        """Watch nothing any more."""
        self._over.set()
        self._thread.join()  # where it is ending the process already, this does not return
        faulthandler.cancel_dump_traceback_later()
        if self._board is not None:
            with suppress(dist.DistError):  # for those who ask when nobody is left here to answer
                self._board.store.set(f"{STANDS}/{self._rank}", AT_ITS_END.to_json())

    @property
    def _board(self) -> Board | None:
        return self._command.board if self._command is not None else None

    def _outside(self) -> _Open:
        return _Open(OUTSIDE, "", time.monotonic(), self._limits.outside)

    def _arm(self, opened: _Open) -> None:
        """Set the last resort: a clock that needs no Python lock prints all stacks, and exits."""
        self._armed = opened.deadline + MARGIN  # when it strikes
        left = max(STEP, self._armed - time.monotonic())
        faulthandler.dump_traceback_later(left, exit=self._ends, file=ERRORS)

    def _watch(self) -> None:
        answered, armed = False, self._open
        while not self._over.wait(POLL):
            opened = self._open
            if time.monotonic() > opened.deadline:
                faulthandler.cancel_dump_traceback_later()
                self._judge(opened)
                return
            if opened is not armed:
                self._arm(opened)
                armed = opened
            with suppress(dist.DistError):  # a store that has vanished is another thread's matter
                if not answered and self._board is not None and self._board.has(ASKED):
                    self._answer(self._board)
                    answered = True

    def _stand(self) -> Stand:
        return stand_of(sys._current_frames()[self._worker], section=str(self._open))

    def _answer(self, board: Board) -> None:
        board.store.set(f"{STANDS}/{self._rank}", self._stand().to_json())

    def _judge(self, opened: _Open) -> None:
        """Tell what this rank does, find out who hangs, and end the job."""
        took = time.monotonic() - opened.started
        over = f"has been open for {took:.1f} s, its limit is {opened.limit:.1f} s"
        say(f"rank {self._rank}: {opened} {over}")
        faulthandler.dump_traceback(file=ERRORS)
        board = self._board
        if board is None:
            guilty, stands = [self._rank], {self._rank: self._stand()}
        else:
            stands = self._ask(board)
            guilty = culprits(stands)
        failure, report = describe(guilty, stands, asker=self._rank, section=str(opened))
        if self._command is not None and self._ends:
            is_first = accuse(self._command, failure, report)
        else:
            is_first = board is None or board.store.add(REPORTED, 1) == 1
            if is_first:
                say(report)
        if is_first and board is not None:
            _show(board, [rank for rank in guilty if stands[rank] is None])

    def _ask(self, board: Board) -> dict[int, Stand | None]:
        """Ask all ranks where they stand; None for one that does not answer."""
        ranks = range(board.world_size)
        answers: dict[int, str | None] = dict.fromkeys(ranks)
        keys = [f"{STANDS}/{rank}" for rank in ranks]
        with suppress(dist.DistError):
            board.store.set(ASKED, "")
            self._answer(board)
            deadline = time.monotonic() + PATIENCE
            while not board.store.check(keys) and time.monotonic() < deadline:
                time.sleep(STEP)
            answers = {rank: board.value(key) for rank, key in zip(ranks, keys, strict=True)}
        return {rank: Stand.from_json(text) if text else None for rank, text in answers.items()}


def _show(board: Board, silent: list[int]) -> None:
    """Make silent ranks on this machine print their stacks, with which they end."""
    for rank in silent:
        home = board.value(f"{HOME}/{rank}")
        machine, process = json.loads(home) if home else ("", 0)
        if machine == _machine():
            say(f"rank {rank}'s stacks:")
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGABRT)
                os.kill(process, signal.SIGCONT)


def _machine() -> str:
    """Name what process numbers are unique in: a machine, or a container on it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return f"unknown/{os.getpid()}"
    return f"{boot.read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
