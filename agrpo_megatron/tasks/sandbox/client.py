"""The caller's side: start the server, and send it batches of calls."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from agrpo_megatron.tasks.sandbox.worker import Outcome

STARTUP_SECONDS = 60.0  # for the start of a server, in addition to the time of its calls
STDERR = 2  # the file descriptor, also if sys.stderr is replaced: stdout may contain results


class ServerEnded(RuntimeError):
    """The server was killed, by a call or by the system because of low memory."""


class Sandbox:
    """Runs `handler = factory(*arguments)` in worker processes; starts at the first call.

    Args:
        factory: `module:function`; called once, in the server.
        seconds: wall time of one call.
        memory: MiB of address space that a call may add.
        workers: processes that make calls at one time.
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
        return [_outcome(data) for data in answer]

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
        program = "from agrpo_megatron.tasks.sandbox.server import main; main()"
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


def _outcome(data: bytes) -> Outcome:
    try:
        return pickle.loads(data)
    except Exception as error:
        return Outcome(None, f"its result cannot be read: {type(error).__name__}: {error}")
