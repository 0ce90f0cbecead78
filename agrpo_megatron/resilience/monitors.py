"""The monitors of a run's sections on this rank."""

import os
import runpy
from pathlib import Path

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.parallel import world_size
from agrpo_megatron.resilience.exit_status import FT_SOCKET
from agrpo_megatron.resilience.limits import Limits
from agrpo_megatron.resilience.nvrx import RankMonitor
from agrpo_megatron.resilience.sections import Monitor
from agrpo_megatron.resilience.watchdog import Watchdog

FAULTS = Path(__file__).parents[2] / "tools" / "faults.py"  # in the source tree only


def monitors(settings: Settings) -> list[Monitor]:
    """Return the monitors of all sections; called by every rank, before process groups exist.

    Injected faults come last: every other monitor must be active when a fault strikes.

    Raises:
        ValueError: `resilience.timeouts` names no section, or the faults are malformed.
    """
    rank = int(os.environ.get("RANK", "0"))
    faults = [_faults(rank)] if os.environ.get("AGRPO_FAULTS") else []
    if settings.resilience.watchdog == "never":
        return faults
    limits = Limits(settings, world_size=world_size(), is_main=rank == 0)
    if FT_SOCKET in os.environ:
        # ft_launcher ends the job a little later; the built-in watchdog names the hung rank first.
        return [Watchdog(limits, rank=rank, ends=False), RankMonitor(limits), *faults]
    return [Watchdog(limits, rank=rank, ends=True), *faults]


def _faults(rank: int) -> Monitor:
    """Load the injected faults of a rank."""
    if not FAULTS.is_file():
        raise ValueError(f"AGRPO_FAULTS needs {FAULTS}; run from the source tree, or unset it")
    return runpy.run_path(str(FAULTS))["Faults"].from_environment(rank)
