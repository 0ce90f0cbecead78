"""Calls in child processes, bounded in time and memory for any input.

    Sandbox --socket--> server (a fresh interpreter: imports once) --fork--> a child for each call

A child over its time limit is killed with all its processes, even inside C code; the
server and later calls are not affected. Children die with the server, the server with its parent.
Their output goes to stderr: the parent's stdout may contain results.
"""

import contextlib
import ctypes
import importlib
import os
import pickle
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

PR_SET_PDEATHSIG = 1  # of Linux' prctl
# SLURM signals every process of a step; the workers leave stopping to the parent.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STARTUP_SECONDS = 60.0  # for the start of a server, in addition to the time of its calls
STDERR = 2  # the file descriptor, also if sys.stderr is replaced

is_child = False  # whether this process is a child, with bounded time and memory


class Outcome(NamedTuple):
    """Result of a call: its value, or the reason for its failure."""

    value: Any
    failure: str | None = None  # such as "timeout" or "ValueError: ..."


class ServerEnded(RuntimeError):
    """The server was killed, by a call or by the system because of low memory."""


class Sandbox:
    """Runs `handler = factory(*arguments)` in child processes; starts at the first call.

    Args:
        factory: `module:function`; called once, in the server.
        seconds: wall time of one call.
        memory: MiB of address space of a call, in addition to the server's.
        workers: number of children at one time.
    """

    def __init__(
        self, factory: str, *arguments: Any, seconds: float, memory: int = 2048, workers: int = 1
    ):
        self._setup = (factory, arguments, seconds, memory, workers)
        self._server: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def run(self, calls: Sequence[tuple]) -> list[Outcome]:
        """Make calls and wait for them; return one outcome per call.

        Raises:
            RuntimeError: the factory raised.
            ServerEnded: the server was killed; the next `run` starts a new one.
        """
        _, _, seconds, _, workers = self._setup
        limit = seconds * (len(calls) / workers + 1) + STARTUP_SECONDS
        try:
            connection = self._open()
            connection.send(list(calls))
            if not connection.poll(limit):
                raise EOFError("no answer")
            answer = connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise ServerEnded(f"the server of {self._setup[0]} ended: {error}") from None
        if isinstance(answer, Exception):
            self.close()
            raise answer
        return answer

    def close(self) -> None:
        """End the server and its calls; an active `run` in another thread raises."""
        server, connection = self._server, self._connection
        self._server = self._connection = None
        if server is not None:
            server.kill()
            server.wait()
        if connection is not None:
            connection.close()

    def _open(self) -> Connection:
        if self._connection is not None:
            return self._connection
        ours, theirs = socket.socketpair()
        program = "from agrpo_megatron.tasks import sandbox; sandbox.main()"
        self._server = subprocess.Popen(
            [sys.executable, "-c", program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=STDERR,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._connection.send(self._setup)
        return self._connection


def main() -> None:
    """Run batches of calls until the parent is gone; the command line gives its socket."""
    for number in IGNORED_SIGNALS:  # inherited by children
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    connection = Connection(int(sys.argv[1]))
    factory, arguments, seconds, memory, workers = connection.recv()
    try:
        module, name = factory.split(":")
        handler = getattr(importlib.import_module(module), name)(*arguments)
    except Exception as error:
        connection.send(RuntimeError(f"{factory}: {type(error).__name__}: {error}"))
        return
    with contextlib.suppress(EOFError, OSError):
        while True:
            calls = connection.recv()
            connection.send(_run_batch(handler, calls, seconds, memory, workers))


class _Child(NamedTuple):
    place: int
    process: int
    pipe: int
    deadline: float
    parts: list[bytes]


def _run_batch(
    handler: Callable, calls: list[tuple], seconds: float, memory: int, workers: int
) -> list[Outcome]:
    outcomes: list[Outcome] = [Outcome(None, "lost")] * len(calls)
    todo, running = list(enumerate(calls)), selectors.DefaultSelector()
    while todo or running.get_map():
        while todo and len(running.get_map()) < workers:
            place, call = todo.pop(0)
            child = _fork(place, handler, call, seconds, memory)
            running.register(child.pipe, selectors.EVENT_READ, child)
        children: list[_Child] = [key.data for key in running.get_map().values()]
        soonest = min(child.deadline for child in children)
        ready = {key.fd for key, _ in running.select(max(0.0, soonest - time.monotonic()))}
        for child in children:
            outcome = _advance(child, has_news=child.pipe in ready)
            if outcome is not None:
                running.unregister(child.pipe)
                os.close(child.pipe)
                outcomes[child.place] = outcome
    return outcomes


def _advance(child: _Child, *, has_news: bool) -> Outcome | None:
    """Read a child's output; return its outcome after its end or timeout, else None."""
    if has_news:
        part = os.read(child.pipe, 1 << 20)
        if part:
            child.parts.append(part)
            return None
        _, status = os.waitpid(child.process, 0)
        with contextlib.suppress(Exception):
            return pickle.loads(b"".join(child.parts))
        return Outcome(None, f"ended with status {os.waitstatus_to_exitcode(status)}")
    if time.monotonic() < child.deadline:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process, signal.SIGKILL)
    os.kill(child.process, signal.SIGKILL)  # it may not lead a process group yet
    os.waitpid(child.process, 0)
    return Outcome(None, "timeout")


def _fork(place: int, handler: Callable, call: tuple, seconds: float, memory: int) -> _Child:
    reading, writing = os.pipe()
    server, process = os.getpid(), os.fork()
    if process == 0:
        os.close(reading)
        os.setsid()  # a process group, so that its own children are killed too
        _die_with_parent()
        if os.getppid() != server:  # the server died before _die_with_parent
            os._exit(0)
        _work(writing, handler, call, memory)
    os.close(writing)
    return _Child(place, process, reading, time.monotonic() + seconds, [])


def _work(pipe: int, handler: Callable, call: tuple, memory: int) -> None:
    """Make one call and write its outcome; runs in the child and never returns."""
    global is_child
    is_child = True
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + (memory << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            outcome = Outcome(handler(*call))
        except MemoryError:
            outcome = Outcome(None, "memory")
        except Exception as error:
            outcome = Outcome(None, f"{type(error).__name__}: {error}"[:500])
        view = memoryview(pickle.dumps(outcome))
        while view:
            view = view[os.write(pipe, view) :]
    finally:
        os._exit(0)  # skips the clean-up of the forked interpreter


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
