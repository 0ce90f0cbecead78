"""Time, sums so far, memory and use of the devices of each RL iteration."""

import time
from collections.abc import Mapping
from typing import Any

from agrpo_megatron.rollout.session import Run
from agrpo_megatron.training.measures.devices import (
    forget_peak,
    memory_peaks,
    rate_of,
    utilisation,
)
from agrpo_megatron.training.measures.totals import Totals


class Measures:
    """Measures one iteration after another; every rank makes every call.

    Args:
        last: the record of the last finished iteration, see `Totals`.
    """

    def __init__(self, run: Run, *, last: Mapping[str, Any]):
        self._ranks, self._totals = run.ranks, Totals(last)
        self._rate = rate_of(run.settings.precision, run.ranks)

    def begin(self) -> None:
        """Begin an iteration."""
        forget_peak(self._ranks)
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def end(
        self, record: Mapping[str, Any], *, tokens: int, counted: Mapping[str, int]
    ) -> dict[str, float]:
        """Return the measures of an iteration that ends now.

        Args:
            record: the other metrics of the iteration.
            tokens: packed tokens that passed through the network.
            counted: the counts that the totals sum, in addition to FLOPs.
        """
        seconds = time.perf_counter() - self._started
        return {
            "timing/iteration": seconds,
            "timing/cpu": time.process_time() - self._cpu_started,
            "perf/tokens_per_second": tokens / seconds,
            **utilisation(record, self._ranks, self._rate),
            **memory_peaks(self._ranks),
            **self._totals.add({**counted, "totals/flops": int(record["flops"])}),
        }
