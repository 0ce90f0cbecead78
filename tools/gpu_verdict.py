"""The exit status of a check of GPUs: right, wrong, slow, or not reached."""

from collections.abc import Sequence
from typing import Any

# Exit status. The first that applies, in the order of PARTS; 2 comes from the scripts.
RIGHT, WRONG, NO_START, SLOW, NOT_REACHED = range(5)
PARTS = (  # key of the finding, status, and what it means
    ("wrong", WRONG, "a result is wrong, or something failed"),
    ("not reached", NOT_REACHED, "nothing is wrong, but something was cut or not measured"),
    ("slow", SLOW, "all is right; a target of speed is missed"),
)
ALL_RIGHT = "all is right"


def verdict(
    *, wrong: Sequence[str], not_reached: Sequence[str], slow: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the exit status, its meaning, and the findings of each kind."""
    found = {"wrong": list(wrong), "not reached": list(not_reached), "slow": list(slow)}
    status, meaning = next(
        ((code, words) for key, code, words in PARTS if found[key]), (RIGHT, ALL_RIGHT)
    )
    return {"status": status, "meaning": meaning, **found}


def verdict_lines(found: dict[str, Any]) -> list[str]:
    """Return a verdict as Markdown: the status on one line, then a line for each finding."""
    findings = [f"- {key}: {text}" for key, *_ in PARTS for text in found[key]]
    status = f"**Exit status {found['status']}: {found['meaning']}.**"
    return [status, *([""] if findings else []), *findings]
