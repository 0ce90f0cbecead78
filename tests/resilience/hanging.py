"""One rank that hangs in its third rollout: `hanging.py FAULT FILE [KEY=VALUE ...]`, by torchrun.

Rank 1 has the fault, or the only rank. The others wait for it in a collective.
"""

import ctypes
import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.resilience.failure import FAILED, command, ending_together
from agrpo_megatron.resilience.monitors import monitors
from agrpo_megatron.resilience.sections import Sections

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def sleeps_for_ever() -> None:
    """Hang where Python's lock is free."""
    while True:
        time.sleep(1000)


def holds_the_lock() -> None:
    """Hang in native code that holds Python's lock."""
    ctypes.PyDLL(None).sleep(1000)


def backtracks() -> None:
    """Hang in a pattern that takes exponential time; it holds Python's lock as well."""
    re.fullmatch(r"(a+)+b", "a" * 60)


def is_stopped() -> None:
    """Be stopped, all threads at once."""
    os.kill(os.getpid(), signal.SIGSTOP)


def disagrees() -> None:
    """Wait in a collective that no other rank takes part in."""
    dist.recv(torch.zeros(1), src=0)


def comes_back() -> None:
    """Continue as soon as this rank is reported as hung, when the others may finish at once."""
    current = command()
    assert current is not None and current.store is not None
    while not current.store.has(FAILED):
        time.sleep(0.001)


def is_well() -> None:
    """Do not hang."""


FAULTS = (sleeps_for_ever, holds_the_lock, backtracks, is_stopped, disagrees, comes_back, is_well)


def main(fault: str, file: str, overrides: list[str]) -> None:
    """Go through three iterations."""
    settings = load(Settings, file, overrides)
    with ending_together():
        sections = Sections(monitors(settings))
        with sections("setup"):
            dist.init_process_group("gloo")
        for iteration in (1, 2, 3):
            sections.at("rl", iteration)
            with sections("rollout"):
                if iteration == 3 and RANK == WORLD - 1:
                    print(f"fault at {time.time()}", flush=True)
                    {known.__name__: known for known in FAULTS}[fault]()
                dist.all_reduce(torch.zeros(1))
            sections.learn({"rollout": sections.longest["rollout"]})
        sections.close()
        dist.destroy_process_group()
    print("finished", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
