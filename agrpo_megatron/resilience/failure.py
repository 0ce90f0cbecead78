"""One rank that fails ends them all, soon, and its error stands first on the screen.

The other ranks wait in a collective that may never return: every rank therefore has a thread that
watches the launcher's store for the failure of another, and that ends its process without asking
the main thread. In the order of events, each on the store under a key of its own:

    FAILED   the first rank to fail claims this, atomically; later ones have nothing to add
    CLEAR    the main rank has left its live view: the screen is free
    TOLD     the failed rank has printed its traceback
    CLOSED   the main rank has said that it ends; now the failed rank exits, before all others,
             since a launcher names the first to exit as the culprit and ends the others
"""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from agrpo_megatron.resilience.board import ANSWER, Board, open_board, say

FAILED, CLEAR, TOLD, CLOSED, REFUSED = "failed", "clear", "told", "closed", "refused"
COUNT, ACCUSED = "count", "accused"
POLL = 0.5  # seconds between two looks of the watching thread
WORD = 2.0  # seconds for each word between ranks, and for the cause of a lost connection to be told
CLOSE = 10.0  # seconds for wandb to write, or to upload, what it holds
AGREE = 5.0  # seconds for all ranks to refuse the same wrong input
STATUS = {"was interrupted": 130}  # else 1
# What gloo, NCCL and the store say when it was another rank that failed.
LOST = re.compile(
    r"closed by peer|reset by peer|connection (?:was )?(?:likely )?(?:closed|refused|reset)"
    r"|broken pipe|pair closure|socket closed|timed out waiting|nccl (?:error|operation)",
    re.IGNORECASE,
)
_command: "Command | None" = None  # the one under way


@dataclass(frozen=True)
class Command:
    """A command under way on this rank."""

    board: Board | None
    leave_screen: Callable[[], object]


def command() -> Command | None:
    """Return what `ending_together` runs on this rank now."""
    return _command


@contextmanager
def ending_together(screen: AbstractContextManager | None = None) -> Iterator[None]:
    """Run a command's work on this rank so that a rank that fails ends all; called by every rank.

    A failed rank's process ends here, and so do the others, without exit handlers. A single rank
    raises as usual, and so do all for a ValueError that every rank raises: wrong input.

    Args:
        screen: entered here, and left before anything is printed about a failure.
    """
    with ExitStack() as stack:
        board = open_board()
        if screen is not None:
            stack.enter_context(screen)
        stack.enter_context(_under_way(Command(board, stack.close)))
        if board is None:
            yield
            return
        try:
            with _watched(board, stack.close):
                yield
        except BaseException as error:
            stack.close()
            _end_all(board, error)
            raise


@contextmanager
def _under_way(command: Command) -> Iterator[None]:
    global _command
    _command = command
    try:
        yield
    finally:
        _command = None


def accuse(command: Command, failure: str, report: str) -> bool:
    """End all ranks, soon, because of what a watching thread found; a single rank ends here.

    Args:
        failure: which rank, and how, in a few words.
        report: what is printed, by the first to accuse one.

    Returns:
        Whether this rank was the first.
    """
    command.leave_screen()
    board = command.board
    if board is None:
        say(report)
        _leave(1)
    with suppress(dist.DistError):
        claimed = board.store.compare_set(FAILED, "", failure).decode()
        if claimed == failure and board.store.add(ACCUSED, 1) == 1:  # others may find the same
            if board.rank != 0:
                board.await_key(CLEAR, WORD)
            say(report)
            board.store.set(TOLD, "")
            # A rank that is killed now ends all by the launcher: let the main rank say why first.
            board.await_key(CLOSED, 1.5 * POLL)
            return True
    return False


@contextmanager
def _watched(board: Board, leave_screen: Callable[[], object]) -> Iterator[None]:
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, over, leave_screen), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()  # where it is ending the process already, this never returns


def _watch(board: Board, over: threading.Event, leave_screen: Callable[[], object]) -> None:
    """End this process soon after another rank has failed, or has taken the store with it."""
    failure = None
    while failure is None:
        is_over = over.wait(POLL)
        try:
            failure = board.value(FAILED)  # at the end as well: it may just have been accused
        except dist.DistError:
            break
        if is_over and failure is None:
            return
    if failure is None and over.wait(ANSWER):
        return  # the host of the store had finished, and so has this rank
    try:
        leave_screen()
    finally:
        if failure is not None:
            _follow(board, failure)
        say(f"rank {board.rank}: ending, because the launcher's store has vanished")
        _leave(1)


def _end_all(board: Board, error: BaseException) -> None:
    """End all ranks because of this one's error; returns only for wrong input."""
    if isinstance(error, ValueError) and _every_rank_refuses(board):
        return
    if threading.current_thread() is threading.main_thread():
        # A launcher that sees a rank killed ends the others: they stay long enough to say why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    is_lost = _is_lost_peer(error)
    how = "was interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    failure = mine = f"rank {board.rank} {how}"
    with suppress(dist.DistError):
        if is_lost:
            board.await_key(FAILED, WORD)
        failure = board.store.compare_set(FAILED, "", mine).decode()
    if failure != mine:
        _follow(board, failure)
    _lead(board, error, failure, is_lost=is_lost)


def _lead(board: Board, error: BaseException, failure: str, *, is_lost: bool) -> NoReturn:
    """Be the first rank that failed: tell the error, let the main rank close, end."""
    with suppress(dist.DistError):
        if board.rank != 0:
            board.await_key(CLEAR, WORD)
    if not isinstance(error, KeyboardInterrupt):
        _tell(board.rank, error, is_lost=is_lost)
    with suppress(dist.DistError):
        board.store.set(TOLD, "")
        if board.rank == 0:
            time.sleep(2 * POLL)  # the store may live here: the others look once more
        elif board.has(CLEAR):
            board.await_key(CLOSED, CLOSE + WORD)
    _leave(_status(failure))


def _follow(board: Board, failure: str) -> NoReturn:
    """End because another rank failed: after it has told why, and on the main rank with a line."""
    with suppress(dist.DistError):
        if board.rank == 0:
            board.store.set(CLEAR, "")
        board.await_key(TOLD, 2 * WORD)
    if board.rank == 0:
        say(f"rank 0: ending, because {failure}")
        _close_wandb(_status(failure))
    with suppress(dist.DistError):
        if board.rank == 0:
            board.store.set(CLOSED, "")
        time.sleep(2 * POLL)
    _leave(_status(failure))


def _every_rank_refuses(board: Board) -> bool:
    """Say whether all ranks raised a ValueError, as they do for wrong input."""
    with suppress(dist.DistError):
        if board.store.add(COUNT, 1) == board.world_size:
            board.store.set(REFUSED, "")
        board.await_key(REFUSED, AGREE)
        is_agreed = board.has(REFUSED)
        if is_agreed and board.rank == 0:
            time.sleep(2 * POLL)  # the store may live here: the others look once more
        return is_agreed
    return False


def _is_lost_peer(error: BaseException) -> bool:
    """Say whether an error only follows from another rank's end, by what led to it."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, dist.DistError):
            return True
        if isinstance(link, RuntimeError) and LOST.search(str(link)):
            return True
        link = link.__cause__ or link.__context__
    return False


def _tell(rank: int, error: BaseException, *, is_lost: bool) -> None:
    """Print the error with its traceback, whole and at once."""
    lines = [f"rank {rank} failed: {type(error).__name__}: {_first_line(error)}\n"]
    if is_lost:
        lines.append("it lost a peer that said nothing: killed, out of memory, or a broken link?\n")
    sys.stdout.flush()
    sys.stderr.write("".join([*lines, *traceback.format_exception(error)]))
    sys.stderr.flush()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _status(failure: str) -> int:
    return STATUS.get(failure.split(maxsplit=2)[2], 1)


def _close_wandb(status: int) -> None:
    """Let wandb, where it runs, keep what it was given; the run's own files are on disk already."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        ending = threading.Thread(target=wandb.teardown, args=(status,), daemon=True)
        ending.start()
        ending.join(CLOSE)


def _leave(status: int) -> NoReturn:
    """End this process without its exit handlers: they would wait for ranks that are gone."""
    try:
        _close_wandb(status)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
