"""The launcher's key-value store, over which ranks report failures without a collective."""

import datetime
import itertools
import os
import sys
import time
from dataclasses import dataclass
from functools import cache

import torch.distributed as dist

from agrpo_megatron.megatron.parallel import world_size

KEY_POLL = 0.05  # seconds between two reads while a rank waits for a key
START_TIMEOUT = 300.0  # seconds for all ranks to start: on a cluster, imports can take minutes
STORE_TIMEOUT = 10.0  # seconds for one request to the store
_uses = itertools.count()  # one process may run several commands: each has its own keys


@dataclass(frozen=True)
class RankStore:
    """The store, as one rank sees it."""

    client: dist.Store
    rank: int
    world_size: int

    def has(self, key: str) -> bool:
        """Return whether some rank has set a key."""
        return self.client.check([key])

    def value(self, key: str) -> str | None:
        """Return the value of a key, or None while no rank has set it."""
        return self.client.get(key).decode() if self.has(key) else None

    def await_key(self, key: str, seconds: float) -> None:
        """Wait until some rank has set a key, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        while not self.has(key) and time.monotonic() < deadline:
            time.sleep(KEY_POLL)


def open_store() -> RankStore | None:
    """Connect to the launcher's store; None for a single rank or without a store."""
    if world_size() == 1:
        return None
    rank = int(os.environ["RANK"])
    try:
        client = _connect(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank)
    except (KeyError, RuntimeError) as error:
        reason = f"no store at MASTER_ADDR:MASTER_PORT ({first_line(error)})"
        say(f"rank {rank}: a failure of another rank will not end this one: {reason}")
        return None
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    attempt = "/".join(os.environ.get(name, "") for name in names)
    prefix = f"agrpo_megatron/{attempt}/{next(_uses)}"
    return RankStore(dist.PrefixStore(prefix, client), rank, world_size())


@cache
def _connect(host: str, port: int, rank: int) -> dist.Store:
    """Connect to torchrun's store; without torchrun, rank 0 hosts the store in this process.

    The process group started later uses the same store. It lives as long as the process.
    """
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        host,
        port,
        is_master=rank == 0 and not is_hosted,
        timeout=datetime.timedelta(seconds=START_TIMEOUT),
        wait_for_workers=False,
        multi_tenant=True,
    )
    store.set_timeout(datetime.timedelta(seconds=STORE_TIMEOUT))
    return store


def say(line: str) -> None:
    """Print a line to the error stream and flush it."""
    print(line, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0]
