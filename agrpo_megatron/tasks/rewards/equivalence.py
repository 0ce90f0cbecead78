"""Equality of two mathematical answers: math-verify, bounded in time and memory."""

import contextlib
import functools
import logging
import re
import signal
from collections.abc import Callable
from typing import Any

from agrpo_megatron.tasks.sandbox import worker
from agrpo_megatron.tasks.sandbox.client import Sandbox, ServerEnded

CPU_SECONDS = 0.8  # processor time of a comparison; a longer one counts as different
WALL_SECONDS = 20 * CPU_SECONDS  # wall time of a comparison, for a busy machine
MAX_CHARACTERS = 20_000  # a longer answer counts as different
_WHOLE_NUMBER = re.compile(r"(?:0|-?[1-9][0-9]{0,14})")

type Comparison = Callable[[str, str], bool]


class _TooLong(BaseException):  # math-verify and sympy suppress Exceptions
    """A comparison used up its time."""


def equal(gold: str, answer: str) -> bool:
    """Return whether `answer` and `gold` are equal in value; LaTeX or plain, no dollar signs.

    The comparison runs in a worker process. For any text it ends within `CPU_SECONDS`, once
    math-verify is loaded.
    """
    if _WHOLE_NUMBER.fullmatch(gold) and _WHOLE_NUMBER.fullmatch(answer):
        return gold == answer  # the same result as math-verify, a thousand times as fast
    return equal_in_text(f"${gold}$", f"${answer}$")


def equal_in_text(gold: str, text: str) -> bool:
    """Return whether math-verify finds the value of `gold` in a text; bounded like `equal`."""
    if len(text) > MAX_CHARACTERS:
        return False
    if worker.is_child:
        return _compare_in_time(gold, text)
    for _ in range(2):  # another process may have killed the server
        with contextlib.suppress(ServerEnded):
            return _in_sandbox(gold, text)
    return False


@functools.lru_cache(maxsize=4096)  # an evaluation asks twice: for the reward and the verdict
def _in_sandbox(gold: str, text: str) -> bool:
    return bool(_sandbox().run([(gold, text)])[0].value)


def load_killable_comparison() -> Comparison:
    """Return a comparison that kills its process after `CPU_SECONDS`, also inside C code."""
    compare = load_comparison()

    def compare_with_timer(gold: str, text: str) -> bool:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        return compare(gold, text)

    return compare_with_timer


@functools.cache
def load_comparison() -> Comparison:
    """Import math-verify (a second) and return its comparison, without time limits."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def compare(gold: str, text: str) -> bool:
        wanted, found = (parse(side, parsing_timeout=0) for side in (gold, text))
        return verify(wanted, found, timeout_seconds=0)

    compare(r"$\frac{1}{2}$", "0.5")  # builds the grammar's tables once, for all workers
    return compare


def _compare_in_time(gold: str, text: str) -> bool:
    """Compare in this process; the process's own limits end long-running C code."""
    compare = load_comparison()
    signal.signal(signal.SIGPROF, _raise_too_long)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS, CPU_SECONDS / 10)
    try:
        return compare(gold, text)
    except (_TooLong, MemoryError):
        worker.is_spent = True  # it may have been anywhere in sympy
        return False
    except Exception:
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _raise_too_long(*_: Any) -> None:
    raise _TooLong


@functools.cache
def _sandbox() -> Sandbox:
    factory = "agrpo_megatron.tasks.rewards.equivalence:load_killable_comparison"
    return Sandbox(factory, seconds=WALL_SECONDS)
