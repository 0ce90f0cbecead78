"""A worker process: it makes one call after the other, each with its own memory limit."""

import contextlib
import itertools
import os
import pickle
import random
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

MOST_CALLS = 1000  # of one worker
MOST_FILES = 64  # that the calls of a worker may leave open
LONGEST = 500  # characters of a failure
LONGEST_TRACE = 5000  # characters of a traceback
CALL = struct.Struct("!Q")  # before a call: its bytes
REPLY = struct.Struct("!Q?")  # before an outcome: its bytes, and whether the worker is worn
INSTALLED = (sys.prefix, sys.base_prefix, "<")  # code of others, and of no file
PACKAGE = str(Path(__file__).parents[2])
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)

is_child = False  # whether this process is a worker, with bounded time and memory
is_spent = False  # whether the server replaces this worker after the call; a call may set it


class Trace(NamedTuple):
    """Where an exception came from."""

    place: str  # FILE:LINE in a file of the user; empty if none is involved
    text: str  # the traceback


class Outcome(NamedTuple):
    """Result of a call: its value, or the reason for its failure."""

    value: Any
    failure: str | None = None  # such as "timeout" or "ValueError: ..."
    trace: Trace | None = None  # of an exception


class _Held(NamedTuple):
    """What a process holds."""

    threads: int
    memory: int  # bytes of address space
    files: int  # open ones


def failed(error: BaseException) -> Outcome:
    """Return the outcome of a call that raised an exception."""
    trace = error.__traceback__
    while trace is not None and _is_ours(trace):
        trace = trace.tb_next
    shown = error.with_traceback(trace or error.__traceback__)
    frames = traceback.extract_tb(shown.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((PACKAGE, *INSTALLED))]
    place = f"{own[-1].filename}:{own[-1].lineno}" if own else ""
    text = "".join(traceback.format_exception(shown))[-LONGEST_TRACE:]
    said = f"{type(error).__name__}: {error}"[:LONGEST]
    return Outcome(None, said, Trace(place, text))


def work(connection: socket.socket, handler: Callable, memory: int) -> NoReturn:
    """Make the calls that the server sends, until it ends this process.

    Each call begins with the random numbers, the current folder and no timer, as in a new process.

    Args:
        memory: MiB of address space that a call may add.
    """
    global is_child
    is_child = True
    try:
        stream, process = connection.makefile("rb"), os.getpid()
        held, restore = _held(), _restorer()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        most = _lower(most, held.memory + 3 * (memory << 20) // 2)  # see _is_worn
        for number in itertools.count(1):
            call = pickle.loads(stream.read(*CALL.unpack(stream.read(CALL.size))))
            restore()
            limit = _lower(most, _held().memory + (memory << 20))
            resource.setrlimit(resource.RLIMIT_AS, (limit, most))
            outcome, is_over = _make(handler, call)
            if os.getpid() != process:  # the call forked, and this is its child
                break
            is_worn = is_spent or is_over or number >= MOST_CALLS or _is_worn(held, memory)
            connection.sendall(REPLY.pack(len(outcome), is_worn) + outcome)
    finally:
        os._exit(0)  # skips the clean-up of the forked interpreter


def _make(handler: Callable, call: tuple) -> tuple[bytes, bool]:
    """Make one call; return its outcome, and whether it ran out of memory."""
    try:
        return pickle.dumps(Outcome(handler(*call))), False
    except MemoryError:
        return pickle.dumps(Outcome(None, "memory")), True
    except Exception as error:
        return pickle.dumps(failed(error)), False


def _restorer() -> Callable[[], None]:
    """Return a function that undoes what a call may change for the next one."""
    folder, state = os.open(".", os.O_RDONLY | os.O_DIRECTORY), random.getstate()
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy is not None else None

    def undo() -> None:
        """Stop timers; reset the folder and the random numbers."""
        for timer in TIMERS:
            signal.setitimer(timer, 0)
        os.fchdir(folder)
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(drawn)

    return undo


def _is_worn(first: _Held, memory: int) -> bool:
    """Return whether calls left threads, processes, many files, or half of a call's memory."""
    now = _held()
    grown = now.memory - first.memory > memory << 19
    if grown or now.threads > first.threads or now.files > first.files + MOST_FILES:
        return True
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    return False


def _held() -> _Held:
    # The name of the program, in parentheses, may hold blanks.
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
    after = fields.rpartition(")")[2].split()
    return _Held(int(after[17]), int(after[20]), len(os.listdir("/proc/self/fd")))


def _lower(most: int, limit: int) -> int:
    return limit if most == resource.RLIM_INFINITY else min(most, limit)


def _is_ours(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename.startswith(PACKAGE)
