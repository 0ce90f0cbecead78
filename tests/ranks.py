"""Run a test function on several gloo ranks, and hand back what each rank returned.

    from tests.ranks import run_ranks

    def _sum_on_every_rank(values):          # module level: every rank imports it by name
        mine = torch.tensor(values[dist.get_rank()])
        dist.all_reduce(mine)
        return mine.item()

    def test_all_reduce():
        assert run_ranks(2, _sum_on_every_rank, [1.0, 2.0]) == [3.0, 3.0]

Each call starts fresh processes, so nothing of Megatron's global state survives from one call, or
one test, to the next. They are forked from a server that imported torch, Megatron-Core and the
package once and did nothing else: a rank starts in milliseconds instead of ten seconds.
"""

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

GRACE = 2.0  # seconds that the other ranks get to end by themselves once one has failed
PORTS = (20000, 32000)  # for rendezvous; Linux hands out those above
# The server imports these: that starts no thread and reads no variable that a test sets.
# The package imports Megatron-Core, so that no kernel is compiled here either. A rank's optimizer
# needs torch's compiler, which takes half a second to import.
PRELOADED = [
    "torch._dynamo",
    "agrpo_megatron.megatron",
    "pytest",
    "agrpo_megatron.training.run",
    "tests.training.tiny",
]
SHOWN = 4000  # characters of a failed rank's output that are shown
RENDEZVOUS = {
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks and return their results, by rank.

    A rank has one thread, no GPU, its own session, the variables that torchrun sets (RANK,
    WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and the gloo group of all
    ranks as the default group, which is torn down at the end.

    Args:
        function: at the top level of a module that can be imported; not a lambda or a closure.
        args: what `pickle` takes, as must be what `function` returns: tensors, numbers, records.
        timeout: seconds for all of it; a rank still running then prints where it stands.
        environment: further variables, set before `function`'s module is imported; what a test
            sets in its own process afterwards does not reach the ranks.

    Raises:
        AssertionError: a rank failed or hung. Its traceback comes first, the others are killed.
    """
    __tracebackhide__ = True
    context = _fork_server()
    shared = {**RENDEZVOUS, "MASTER_PORT": str(_free_port()), **(environment or {})}
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        job = (function.__module__, function.__qualname__, args)
        (folder / "job").write_bytes(pickle.dumps(job))
        ranks = []
        try:
            for rank in range(world_size):
                arguments = (folder, rank, world_size, timeout, shared)
                ranks.append(context.Process(target=_rank_main, args=arguments))
                ranks[-1].start()
            _wait_for(ranks, timeout)
            failures = _failures(ranks, folder)
        finally:
            _kill(ranks)
        if failures:
            raise AssertionError("\n".join(failures))
        return [pickle.loads((folder / f"result-{r}").read_bytes()) for r in range(world_size)]


def _fork_server() -> multiprocessing.context.ForkServerContext:
    """Return the context whose server has `PRELOADED` imported, started once.

    Where Transformer Engine is installed, the server leaves out the package: tests of it replace
    kernels before a rank imports the package.
    """
    context = multiprocessing.get_context("forkserver")
    has_te = importlib.util.find_spec("transformer_engine") is not None
    context.set_forkserver_preload(["megatron.core"] if has_te else PRELOADED)
    wanted = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    return context


def _free_port() -> int:
    """Return a port below those that the system hands out: no other connection can take it."""
    while True:
        port = random.SystemRandom().randrange(*PORTS)  # a test may have seeded random
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            return port


def _rank_main(
    folder: Path, rank: int, world_size: int, timeout: float, shared: dict[str, str]
) -> None:
    """Be one rank: everything it prints goes to `output-RANK`, its result to `result-RANK`."""
    os.setsid()
    gc.freeze()  # a collection need not look through (and so copy) what the server imported
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.dump_traceback_later(timeout, exit=True)
    place = {"RANK": rank, "LOCAL_RANK": rank}
    place |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(shared)
    try:
        result = call_in_group(folder, rank, world_size)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"failure-{rank}").write_text(traceback.format_exc())
        _leave(1)
    _leave(0)


def call_in_group(folder: Path, rank: int, world_size: int) -> Any:
    """Join the gloo group of `folder`, call the function in its file `job`, and leave the group."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    module, name, args = pickle.loads((folder / "job").read_bytes())
    result = getattr(importlib.import_module(module), name)(*args)
    if dist.is_initialized():
        dist.barrier()  # no rank closes its connections while another still uses them
        dist.destroy_process_group()
    return result


def _leave(status: int) -> None:
    """End without running exit handlers: a failed rank's group would wait for its peers there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait_for(ranks: list[Any], timeout: float) -> None:
    """Wait until all ranks ended, or until `GRACE` after the first one that failed."""
    deadline = time.monotonic() + timeout + GRACE
    running = {rank.sentinel: rank for rank in ranks}
    while running and time.monotonic() < deadline:
        for sentinel in wait(list(running), deadline - time.monotonic()):
            if running.pop(sentinel).exitcode != 0:
                deadline = min(deadline, time.monotonic() + GRACE)


def _failures(ranks: list[Any], folder: Path) -> list[str]:
    """Describe the ranks that failed; the first to raise comes first, as others only lost it."""
    raised = sorted(folder.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
    order = [int(path.name.partition("-")[2]) for path in raised]
    order += [number for number in range(len(ranks)) if number not in order]
    lines = []
    for number in order:
        if ranks[number].exitcode == 0:
            continue
        trace, output = folder / f"failure-{number}", folder / f"output-{number}"
        reason = trace.read_text() if trace.exists() else _how_it_ended(ranks[number].exitcode)
        lines.append(f"rank {number} of {len(ranks)}: {reason}".rstrip())
        printed = output.read_text(errors="replace")[-SHOWN:].strip() if output.exists() else ""
        lines += [f"rank {number} printed: {printed}"] if printed else []
    return lines


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is None:
        return "was still running and was killed"
    return f"ended with status {exitcode}" if exitcode > 0 else f"was killed by signal {-exitcode}"


def _kill(ranks: list[Any]) -> None:
    """Kill every rank that still runs, and whatever any rank left behind in its session."""
    for rank in ranks:
        if rank.pid is None:
            continue
        try:
            os.killpg(rank.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            rank.kill()
        rank.join()
