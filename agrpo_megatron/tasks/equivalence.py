"""Whether two mathematical answers are equal: math-verify, bounded in time and memory."""

import functools
import logging
from collections.abc import Callable

from agrpo_megatron.tasks import sandbox

SECONDS = 1.0  # of one comparison; what takes longer counts as different
LONGEST = 5000  # characters of an answer that is looked at


def equal(gold: str, answer: str) -> bool:
    """Say whether `answer` means the same as `gold`; LaTeX or plain, without dollar signs.

    Any text gets an answer, within `SECONDS` once math-verify is loaded: the comparison runs in
    a child process that is killed when its time is over.
    """
    if len(answer) > LONGEST:
        return False
    if sandbox.is_inside():
        return load_comparison()(gold, answer)
    return bool(_sandbox().run([(gold, answer)])[0].value)


@functools.cache
def load_comparison() -> Callable[[str, str], bool]:
    """Import math-verify (a second) and return its comparison, without time limits of its own."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def compare(gold: str, answer: str) -> bool:
        parsed = [parse(f"${text}$", parsing_timeout=0) for text in (gold, answer)]
        return verify(*parsed, timeout_seconds=0)

    compare(r"\frac{1}{2}", "0.5")  # builds the grammar's tables here, not in every child
    return compare


@functools.cache
def _sandbox() -> sandbox.Sandbox:
    return sandbox.Sandbox("agrpo_megatron.tasks.equivalence:load_comparison", seconds=SECONDS)
