"""Who watches the sections of a run on this rank."""

import os

from agrpo_megatron.resilience.faults import Faults
from agrpo_megatron.resilience.sections import Monitor
from agrpo_megatron.settings import Settings


def monitors(settings: Settings) -> list[Monitor]:
    """Return what is told of every section; called by every rank, before process groups exist.

    Injected faults come last: who watches must watch already when one strikes.
    """
    rank = int(os.environ.get("RANK", "0"))
    return [Faults.from_environment(rank)]
