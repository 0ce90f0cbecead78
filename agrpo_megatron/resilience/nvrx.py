"""The adapter to nvidia-resiliency-ext: its `ft_launcher` watches the sections of each rank.

    python -m agrpo_megatron.resilience.nvrx FILE [KEY=VALUE ...]

prints the options of `ft_launcher` for a run, one per line. The launcher has one process per rank,
which kills the rank if a section exceeds its limit; it then restarts all ranks within the job. Its
limits are longer than the built-in watchdog's, which names the hung rank first.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.resilience.sections import NAMES, Monitor

if TYPE_CHECKING:  # job scripts print the options without loading torch
    from agrpo_megatron.resilience.limits import Limits

PACKAGE = "nvidia_resiliency_ext"
LATER = 20.0  # seconds after the watchdog's limit: over its REPLY_TIMEOUT and HARD_EXIT_DELAY
CHECK_INTERVAL = 1.0  # seconds
# Without a section of this name, 0.7.0 does not watch the time between sections.
BETWEEN = "warmup"


class RankMonitor(Monitor):
    """Reports this rank's sections to ft_launcher; the built-in watchdog updates the limits."""

    def __init__(self, limits: "Limits"):
        self._limits = limits
        self._sent = {name: limits.of(name, "setup") for name in NAMES}
        self._client = import_module(f"{PACKAGE}.fault_tolerance").RankMonitorClient()
        self._send_limits()
        self._client.init_workload_monitoring(num_warmup_iters=0)

    def start(self, section: str, phase: str, iteration: int) -> None:
        """Open a section with its current limit."""
        limit = self._limits.of(section, phase)
        if self._sent[section] != limit:
            self._sent[section] = limit
            self._send_limits()
        self._client.start_section(section)

    def end(self, section: str, *, is_whole: bool) -> None:
        """Close a section."""
        self._client.end_section(section)

    def close(self) -> None:
        """Stop monitoring this rank."""
        self._client.shutdown_workload_monitoring()

    def _send_limits(self) -> None:
        """Set the limits, as the package sets the limits that it calculates itself.

        Its own calculation has no minimum: a section of milliseconds would get a limit of
        milliseconds.
        """
        limits = {name: limit + LATER for name, limit in self._sent.items()}
        outside = self._limits.outside + LATER
        section = {
            "section": {**limits, BETWEEN: outside},
            "out_of_section": outside,
            "calculated_sections": list(limits),
            "is_out_of_section_calculated": True,
        }
        self._client.load_state_dict({"current_timeouts": {"section": section}})


def launcher_options(settings: Settings) -> list[str]:
    """Return the options of ft_launcher; its ranks update the limits later."""
    resilience = settings.resilience
    if resilience.watchdog == "never":
        return []
    first = resilience.first_timeout
    limits = {name: float(resilience.timeouts.get(name, first)) + LATER for name in NAMES}
    limits[BETWEEN] = first + LATER
    return [
        "--ft-rank-section-timeouts=" + ",".join(f"{name}:{s:g}" for name, s in limits.items()),
        f"--ft-rank-out-of-section-timeout={first + LATER:g}",
        f"--ft-workload-check-interval={CHECK_INTERVAL:g}",
        "--ft-max-no-progress-cycles=0",  # a run counts attempts without progress itself
    ]


def main(arguments: list[str]) -> int:
    """Print the options of ft_launcher for a run; returns the exit status."""
    words = [word for word in arguments if not word.startswith("-")]
    if not words:
        print("usage: python -m agrpo_megatron.resilience.nvrx FILE [KEY=VALUE ...]")
        return 2
    try:
        settings = load(Settings, words[0], words[1:])
    except (OSError, ValueError) as error:
        print(f"agrpo: error: {error}", file=sys.stderr)
        return 2
    for option in launcher_options(settings):
        print(option)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
