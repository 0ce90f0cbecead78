"""Where ranks tell each other of failures: the launcher's store, apart from all collectives."""

import datetime
import itertools
import os
import sys
import time
from dataclasses import dataclass
from functools import cache

import torch.distributed as dist

from agrpo_megatron.megatron.parallel import world_size

STEP = 0.05  # seconds between two looks while ranks wait for each other's word
CONNECT = 300.0  # seconds for all ranks to start: on a cluster, imports can take minutes
ANSWER = 10.0  # seconds that the store may take to answer
_uses = itertools.count()  # one process may run several commands: each has its own keys


@dataclass(frozen=True)
class Board:
    """The store, as one rank sees it."""

    store: dist.Store
    rank: int
    world_size: int

    def has(self, key: str) -> bool:
        """Say whether some rank has set a key."""
        return self.store.check([key])

    def value(self, key: str) -> str | None:
        """Return what some rank has set a key to, or None."""
        return self.store.get(key).decode() if self.has(key) else None

    def await_key(self, key: str, seconds: float) -> None:
        """Wait until some rank has set a key, but not longer."""
        deadline = time.monotonic() + seconds
        while not self.has(key) and time.monotonic() < deadline:
            time.sleep(STEP)


def open_board() -> Board | None:
    """Meet the other ranks at the launcher's store; None for a single rank or without a store."""
    if world_size() == 1:
        return None
    rank = int(os.environ["RANK"])
    try:
        store = _connect(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank)
    except (KeyError, RuntimeError) as error:
        reason = f"no store at MASTER_ADDR:MASTER_PORT ({str(error).partition(chr(10))[0]})"
        say(f"rank {rank}: a failure of another rank will not end this one: {reason}")
        return None
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    attempt = "/".join(os.environ.get(name, "") for name in names)
    prefix = f"agrpo_megatron/{attempt}/{next(_uses)}"
    return Board(dist.PrefixStore(prefix, store), rank, world_size())


@cache
def _connect(host: str, port: int, rank: int) -> dist.Store:
    """Connect to the store that torchrun hosts, or else rank 0, in which case it starts here.

    The process group started later finds it there. It lives as long as the process.
    """
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        host,
        port,
        is_master=rank == 0 and not is_hosted,
        timeout=datetime.timedelta(seconds=CONNECT),
        wait_for_workers=False,
        multi_tenant=True,
    )
    store.set_timeout(datetime.timedelta(seconds=ANSWER))
    return store


def say(line: str) -> None:
    """Print a line to the error stream at once."""
    print(line, file=sys.stderr, flush=True)
