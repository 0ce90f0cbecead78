"""Sums over the iterations of a run so far."""

from collections.abc import Mapping
from typing import Any

PREFIX = "totals/"


class Totals:
    """Sums that continue over restarts: a log that was cut back ends with those of its checkpoint.

    Args:
        last: the record of the last finished iteration; empty for a new phase, and on ranks
            without a log, whose sums nothing reads. One of a version without sums has no totals:
            then the phase has none.
    """

    def __init__(self, last: Mapping[str, Any]):
        self._sums = {key: value for key, value in last.items() if key.startswith(PREFIX)}
        self._has_totals = not last or bool(self._sums)

    def add(self, counted: Mapping[str, int]) -> dict[str, int]:
        """Add an iteration's counts; returns the sums under the same names, `totals/NAME`."""
        if not self._has_totals:
            return {}
        self._sums = {name: self._sums.get(name, 0) + count for name, count in counted.items()}
        return dict(self._sums)
