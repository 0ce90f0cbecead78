"""The server: it imports once, and hands the calls of a batch to its workers."""

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple

from agrpo_megatron.tasks.sandbox.worker import CALL, REPLY, Outcome, work

PR_SET_PDEATHSIG = 1  # of Linux' prctl
# SLURM signals every process of a step; the workers leave stopping to the parent.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class _Limits(NamedTuple):
    seconds: float  # of one call
    memory: int  # MiB that one call may add
    workers: int


@dataclass
class _Worker:
    process: int
    connection: socket.socket
    place: int = 0  # of its call in the batch
    deadline: float = 0.0
    received: bytearray = field(default_factory=bytearray)


def main() -> None:
    """Run batches of calls until the parent is gone; the command line gives its socket."""
    for number in IGNORED_SIGNALS:  # inherited by workers
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    connection = Connection(int(sys.argv[1]))
    factory, arguments, *limits = connection.recv()
    try:
        module, name = factory.split(":")
        handler = getattr(importlib.import_module(module), name)(*arguments)
    except Exception as error:
        connection.send(RuntimeError(f"{factory}: {type(error).__name__}: {error}"))
        return
    gc.collect()
    gc.freeze()  # workers share these pages, as nothing collects them
    idle: list[_Worker] = []
    with contextlib.suppress(EOFError, OSError):
        while True:
            calls = connection.recv()
            connection.send(_run_batch(handler, calls, _Limits(*limits), idle))


def _run_batch(
    handler: Callable, calls: list[tuple], limits: _Limits, idle: list[_Worker]
) -> list[bytes]:
    """Make calls; return their pickled outcomes. Takes workers from `idle`, and returns them."""
    outcomes, todo = [b""] * len(calls), deque(enumerate(calls))
    with selectors.DefaultSelector() as busy:
        while todo or busy.get_map():
            while todo and len(busy.get_map()) < limits.workers:
                worker = _assigned(handler, *todo.popleft(), limits, idle)
                busy.register(worker.connection, selectors.EVENT_READ, worker)
            for worker, outcome, is_over in _replies(busy):
                busy.unregister(worker.connection)
                status = _end(worker) if is_over else 0
                outcomes[worker.place] = outcome or _failure(f"ended with status {status}")
                idle += [] if is_over else [worker]
    return outcomes


def _replies(busy: selectors.BaseSelector) -> Iterator[tuple[_Worker, bytes, bool]]:
    """Wait for news or a deadline; yield workers, outcomes, and whether the worker has to end."""
    at_work: list[_Worker] = [key.data for key in busy.get_map().values()]
    soonest = min(worker.deadline for worker in at_work)
    ready = {key.fd for key, _ in busy.select(max(0.0, soonest - time.monotonic()))}
    for worker in at_work:
        reply = _advance(worker, has_news=worker.connection.fileno() in ready)
        if reply is not None:
            yield worker, *reply


def _assigned(
    handler: Callable, place: int, call: tuple, limits: _Limits, idle: list[_Worker]
) -> _Worker:
    """Send a call to an idle worker, or to a new one."""
    data = pickle.dumps(call)
    while True:
        is_new = not idle
        worker = _fork(handler, limits.memory) if is_new else idle.pop()
        worker.place, worker.deadline = place, time.monotonic() + limits.seconds
        worker.received.clear()
        try:
            worker.connection.sendall(CALL.pack(len(data)) + data)
            return worker
        except OSError:  # another process killed the worker while it was idle
            if is_new:
                return worker  # its outcome says how it ended
            _end(worker)


def _advance(worker: _Worker, *, has_news: bool) -> tuple[bytes, bool] | None:
    """Return a call's outcome, and whether its worker has to end; None if the call is not over.

    The outcome is empty if the worker ended.
    """
    if not has_news:
        is_late = time.monotonic() >= worker.deadline
        return (_failure("timeout"), True) if is_late else None
    try:
        part = worker.connection.recv(1 << 20)
    except OSError:
        part = b""
    if not part:
        return b"", True
    worker.received += part
    if len(worker.received) < REPLY.size:
        return None
    size, is_worn = REPLY.unpack_from(worker.received)
    outcome = bytes(worker.received[REPLY.size :])
    return (outcome, is_worn) if len(outcome) == size else None


def _failure(reason: str) -> bytes:
    return pickle.dumps(Outcome(None, reason))


def _fork(handler: Callable, memory: int) -> _Worker:
    ours, theirs = socket.socketpair()
    server, process = os.getpid(), os.fork()
    if process == 0:
        ours.close()
        os.setsid()  # a process group, so that its own children are killed too
        _die_with_parent()
        if os.getppid() != server:  # the server died before _die_with_parent
            os._exit(0)
        work(theirs, handler, memory)
    theirs.close()
    return _Worker(process, ours)


def _end(worker: _Worker) -> int:
    """Kill a worker and the processes of its group; return its status, its own if it had ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process, signal.SIGKILL)
    os.kill(worker.process, signal.SIGKILL)  # it may not lead a process group yet
    _, status = os.waitpid(worker.process, 0)
    worker.connection.close()
    return os.waitstatus_to_exitcode(status)


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
