"""Numbers, durations and token pieces as readable text."""

import json
import math
from collections.abc import Sequence
from typing import Any

MASK_DOT = "\u00b7"
TAIL_BOX = "\u25a1"
_FLOP = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
_SCALES = ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
_NAMED = {"\n": "\u23ce", "\t": "\u21e5"}
_EMPTY = "\u2205"


def percent(share: float, digits: int = 1) -> str:
    """Return a share as a percentage: 0.125 is `12.5%`."""
    return f"{100 * share:.{digits}f}%"


def points(gain: float) -> str:
    """Return a difference of two shares in percentage points, signed."""
    return f"{100 * gain:+.1f} points"


def duration(seconds: float) -> str:
    """Return seconds as `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min` or `3 d 4 h`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def compact(value: float) -> str:
    """Return a number in at most four significant digits, with k, M, B or T where it is large."""
    if not math.isfinite(value):
        return str(value)
    for least, unit, suffix in _SCALES:
        if abs(value) >= least:
            return f"{value / unit:.3g}{suffix}"
    if value == int(value):
        return str(int(value))
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}" if abs(value) < 100 else f"{value:.0f}"


def flop(count: float) -> str:
    """Return a number of operations as `1.8 TFLOP`."""
    name, unit = next((pair for pair in _FLOP if count >= pair[1]), _FLOP[-1])
    return f"{count / unit:.3g} {name}"


def counted(count: int, name: str) -> str:
    """Return a number with the name of what it counts, in the plural where it is not one."""
    return f"{count} {name}{'s' * (count != 1)}"


def number(row: dict[str, Any], key: str) -> float | None:
    """Return a metric if present and finite, else None."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def written(value: Any) -> str:
    """Return a setting's value as YAML."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def visible(piece: str) -> str:
    """Return a token piece on one line, without control or escape characters.

    Line feeds, tabs and empty pieces get a symbol; other unprintable characters get U+FFFD.
    """
    # A lone surrogate is not printable, so the result always encodes.
    shown = (char if char.isprintable() else _NAMED.get(char, "\ufffd") for char in piece)
    return "".join(shown) or _EMPTY


def tail_start(pieces: Sequence[str]) -> int:
    """Return where the run of equal pieces at the end begins; `len(pieces)` if it is under four.

    Completions end in many end-of-text tokens; views fold this run into one cell.
    """
    start = len(pieces)
    while start and pieces[start - 1] == pieces[-1]:
        start -= 1
    return start if len(pieces) - start >= 4 else len(pieces)
