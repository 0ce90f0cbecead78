"""The `agrpo` command with a fault on one rank: `faulty.py FAULT COMMAND ...`, started by torchrun.

The fault strikes in the second rollout of the reinforcement learning, when every rank has met the
others in many collectives. Rank 1 has it; what rank 0 does meanwhile is wait in the next one.
"""

import os
import signal
import sys
import time

import torch

from agrpo_megatron.cli import main as cli
from agrpo_megatron.rollout import generate

RANK = int(os.environ["RANK"])
CALLS = 3  # samplings: evaluation before, first iteration, second iteration


def broken_code() -> None:
    """Fail as code with a bug does; rank 0 is stuck where no exception reaches it."""
    if RANK == 0:
        time.sleep(1000)
    raise ZeroDivisionError("somebody divided by zero\nsecond line of the message")


def out_of_memory() -> None:
    """Fail as a forward pass on a full GPU does."""
    if RANK == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def killed() -> None:
    """Die as under the kernel's out-of-memory killer: without a word."""
    if RANK == 1:
        time.sleep(3)  # until rank 0 waits for this one: elsewhere it is ended before it notices
        os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> None:
    """Be interrupted as by Ctrl-C, on one rank only."""
    if RANK == 1:
        raise KeyboardInterrupt


FAULTS = {fault.__name__: fault for fault in (broken_code, out_of_memory, killed, interrupted)}


def main(name: str, arguments: list[str]) -> int:
    """Run the command, with the fault after one sampling."""
    grading_calls, calls = generate.grading_calls, []

    def faulty(*args, **options):
        calls.append(time.time())
        if len(calls) == CALLS:
            print(f"fault at {time.time()}", flush=True)
            FAULTS[name]()
        return grading_calls(*args, **options)

    generate.grading_calls = faulty
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
