"""When one rank fails, all ranks end soon, and the first error is printed first.

The other ranks wait in a collective that may never return. Every rank therefore has a thread that
polls the launcher's store for a failure of another rank and ends its process without the main
thread's help. The events, in order, each a key of the store:

    FAILED         the first rank to fail sets this atomically; later ones only follow
    SCREEN_FREE    the main rank has left its live view
    PRINTED        the failed rank has printed its traceback
    MAIN_DONE      the main rank has printed why it ends; now the failed rank exits, before all
                   others, since a launcher names the first to exit as the culprit
"""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from agrpo_megatron.resilience.store import STORE_TIMEOUT, RankStore, first_line, open_store, say
from agrpo_megatron.runs.files import DiskFull

FAILED, SCREEN_FREE, PRINTED, MAIN_DONE = "failed", "screen_free", "printed", "main_done"
REFUSALS, ALL_REFUSED, REPORTED = "refusals", "all_refused", "reported"
FAILURE_POLL = 0.5  # seconds between two reads of FAILED by the watching thread
MESSAGE_TIMEOUT = 2.0  # seconds for one message between ranks, and for a lost peer to report
WANDB_TIMEOUT = 10.0  # seconds for wandb to write, or upload, its data
REFUSAL_TIMEOUT = 5.0  # seconds for all ranks to refuse the same wrong input
# Messages of gloo, NCCL and the store after the failure of another rank.
LOST = re.compile(
    r"closed by peer|reset by peer|connection (?:was )?(?:likely )?(?:closed|refused|reset)"
    r"|broken pipe|pair closure|socket closed|timed out waiting|nccl (?:error|operation)",
    re.IGNORECASE,
)
INTERRUPTED = "was interrupted"
_command: "Command | None" = None  # the running command


@dataclass(frozen=True)
class Command:
    """A command that runs on this rank."""

    store: RankStore | None
    leave_screen: Callable[[], object]


def command() -> Command | None:
    """Return the command that `ending_together` runs on this rank now, or None."""
    return _command


def outlive_launcher() -> None:
    """Ignore signals: a launcher ends the other ranks once one dies, and they first print why."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def ends_all() -> bool:
    """Return whether an error of this rank now ends all ranks."""
    return _command is not None and _command.store is not None


@contextmanager
def ending_together(screen: AbstractContextManager | None = None) -> Iterator[None]:
    """Run a command's work; a rank that fails ends all ranks. Called by every rank.

    A failure ends every process here, without exit handlers. Errors are raised as usual on a
    single rank, and when all ranks raise a ValueError: wrong input.

    Args:
        screen: entered here, and left before a failure is printed.
    """
    global _command
    with ExitStack() as stack:
        store = open_store()
        if screen is not None:
            stack.enter_context(screen)
        _command = Command(store, stack.close)
        try:
            with nullcontext() if store is None else _watched(store, stack.close):
                yield
        except BaseException as error:
            if store is not None:
                stack.close()
                _end_all(store, error)
            raise
        finally:
            _command = None


def report_failure(command: Command, failure: str, report: str) -> bool:
    """End all ranks because a watching thread found a failure; a single rank exits here.

    Args:
        failure: the rank, and how it failed, in a few words.
        report: printed by the first rank that reports the failure.

    Returns:
        Whether this rank was the first.
    """
    command.leave_screen()
    store = command.store
    if store is None:
        say(report)
        _exit(1)
    with suppress(dist.DistError):
        claimed = store.client.compare_set(FAILED, "", failure).decode()
        if claimed == failure and store.client.add(REPORTED, 1) == 1:  # others may find it too
            if store.rank != 0:
                store.await_key(SCREEN_FREE, MESSAGE_TIMEOUT)
            say(report)
            store.client.set(PRINTED, "")
            # The launcher kills all ranks once one dies: the main rank prints why first.
            store.await_key(MAIN_DONE, 1.5 * FAILURE_POLL)
            return True
    return False


@contextmanager
def _watched(store: RankStore, leave_screen: Callable[[], object]) -> Iterator[None]:
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(store, over, leave_screen), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()  # never returns if the thread is ending the process


def _watch(store: RankStore, over: threading.Event, leave_screen: Callable[[], object]) -> None:
    """End this process soon after another rank has failed or the store has vanished."""
    failure = None
    while failure is None:
        is_over = over.wait(FAILURE_POLL)
        try:
            failure = store.value(FAILED)  # at the end too: a failure may be new
        except dist.DistError:
            break
        if is_over and failure is None:
            return
    if failure is None and over.wait(STORE_TIMEOUT):
        return  # the store's host had finished, and so has this rank
    try:
        leave_screen()
    finally:
        if failure is not None:
            _end_after(store, failure)
        say(f"rank {store.rank}: ending, because the launcher's store has vanished")
        _exit(1)


def _end_all(store: RankStore, error: BaseException) -> None:
    """End all ranks because of this rank's error; returns only for wrong input."""
    is_own = isinstance(error, DiskFull) and store.world_size > 1  # the others will not have it
    if isinstance(error, ValueError) and not is_own and _every_rank_refuses(store):
        return
    outlive_launcher()
    is_lost = _is_lost_peer(error)
    how = INTERRUPTED if isinstance(error, KeyboardInterrupt) else "failed"
    failure = mine = f"rank {store.rank} {how}"
    with suppress(dist.DistError):
        if is_lost:
            store.await_key(FAILED, MESSAGE_TIMEOUT)
        failure = store.client.compare_set(FAILED, "", mine).decode()
    if failure != mine:
        _end_after(store, failure)
    _end_first(store, error, failure, is_lost=is_lost)


def _end_first(store: RankStore, error: BaseException, failure: str, *, is_lost: bool) -> NoReturn:
    """End as the first rank that failed: print the error, wait for the main rank, exit."""
    with suppress(dist.DistError):
        if store.rank != 0:
            store.await_key(SCREEN_FREE, MESSAGE_TIMEOUT)
    if not isinstance(error, KeyboardInterrupt):
        _print_error(store.rank, error, is_lost=is_lost)
    with suppress(dist.DistError):
        store.client.set(PRINTED, "")
        if store.rank == 0:
            time.sleep(2 * FAILURE_POLL)  # the store may live here: the others still read it
        elif store.has(SCREEN_FREE):
            store.await_key(MAIN_DONE, WANDB_TIMEOUT + MESSAGE_TIMEOUT)
    _exit(_status(failure))


def _end_after(store: RankStore, failure: str) -> NoReturn:
    """End because another rank failed, once that rank has printed its error."""
    with suppress(dist.DistError):
        if store.rank == 0:
            store.client.set(SCREEN_FREE, "")
        store.await_key(PRINTED, 2 * MESSAGE_TIMEOUT)
    if store.rank == 0:
        say(f"rank 0: ending, because {failure}")
        _close_wandb(_status(failure))
    with suppress(dist.DistError):
        if store.rank == 0:
            store.client.set(MAIN_DONE, "")
        time.sleep(2 * FAILURE_POLL)
    _exit(_status(failure))


def _every_rank_refuses(store: RankStore) -> bool:
    """Return whether all ranks raised a ValueError, as they do for wrong input."""
    with suppress(dist.DistError):
        if store.client.add(REFUSALS, 1) == store.world_size:
            store.client.set(ALL_REFUSED, "")
        store.await_key(ALL_REFUSED, REFUSAL_TIMEOUT)
        is_agreed = store.has(ALL_REFUSED)
        if is_agreed and store.rank == 0:
            time.sleep(2 * FAILURE_POLL)  # the store may live here: the others still read it
        return is_agreed
    return False


def _is_lost_peer(error: BaseException) -> bool:
    """Return whether another rank's end caused an error, by the chain of its causes."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, dist.DistError):
            return True
        if isinstance(link, RuntimeError) and LOST.search(str(link)):
            return True
        link = link.__cause__ or link.__context__
    return False


def _print_error(rank: int, error: BaseException, *, is_lost: bool) -> None:
    """Print the error and its traceback in one write."""
    lines = [f"rank {rank} failed: {type(error).__name__}: {first_line(error)}\n"]
    if is_lost:
        lines.append("its peer was lost without an error: killed, out of memory, or broken link?\n")
    sys.stdout.flush()
    if not isinstance(error, DiskFull):
        lines += traceback.format_exception(error)
    sys.stderr.write("".join(lines))
    sys.stderr.flush()


def _status(failure: str) -> int:
    return 130 if failure.endswith(INTERRUPTED) else 1


def _close_wandb(status: int) -> None:
    """Let wandb, if it runs, write its data; the run's own files are on disk already."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        ending = threading.Thread(target=wandb.teardown, args=(status,), daemon=True)
        ending.start()
        ending.join(WANDB_TIMEOUT)


def _exit(status: int) -> NoReturn:
    """Exit without exit handlers: they would wait for ranks that are gone."""
    try:
        _close_wandb(status)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
