"""The monitors of a run's sections on this rank."""

import os

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.parallel import world_size
from agrpo_megatron.resilience import FAULTS
from agrpo_megatron.resilience.limits import Limits
from agrpo_megatron.resilience.nvrx import RankMonitor, is_under_ft_launcher
from agrpo_megatron.resilience.sections import Monitor
from agrpo_megatron.resilience.watchdog import Watchdog


def monitors(settings: Settings) -> list[Monitor]:
    """Return the monitors of all sections; called by every rank, before process groups exist.

    Injected faults come last: every other monitor must be active when a fault strikes.

    Raises:
        ValueError: `resilience.timeouts` names no section, or the faults are malformed.
    """
    rank = int(os.environ.get("RANK", "0"))
    faults: list[Monitor] = []
    if os.environ.get(FAULTS):
        from agrpo_megatron.resilience.faults import Faults  # other runs never load it

        faults = [Faults.from_environment(rank)]
    if settings.resilience.watchdog == "never":
        return faults
    limits = Limits(settings, world_size=world_size(), is_main=rank == 0)
    if is_under_ft_launcher():
        # ft_launcher ends the job a little later; the built-in watchdog names the hung rank first.
        return [Watchdog(limits, rank=rank, ends=False), RankMonitor(limits), *faults]
    return [Watchdog(limits, rank=rank, ends=True), *faults]
