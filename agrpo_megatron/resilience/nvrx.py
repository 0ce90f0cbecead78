"""The adapter to nvidia-resiliency-ext: its `ft_launcher` watches the sections of each rank.

    python -m agrpo_megatron.resilience.nvrx FILE [KEY=VALUE ...]

prints what `ft_launcher` is given for a run, a word per line. Rank by rank, the launcher has a
process that kills a rank whose section is open for too long, and it starts all ranks anew, within
the job. Limits are those of the built-in watchdog and a little more, so that it has told by then
who hangs.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.resilience.outcome import FT_SOCKET
from agrpo_megatron.resilience.sections import NAMES

if TYPE_CHECKING:  # job scripts ask for the words where nobody waits for torch
    from agrpo_megatron.resilience.limits import Limits

PACKAGE = "nvidia_resiliency_ext"
LATER = 20.0  # seconds after the built-in watchdog's limit: more than its PATIENCE and MARGIN
CHECK = 1.0  # seconds between two looks
# Without a section of this name, 0.7.0 does not watch what is between sections.
BETWEEN = "warmup"


def is_under_ft_launcher() -> bool:
    """Say whether ft_launcher watches this rank."""
    return FT_SOCKET in os.environ


class RankMonitor:
    """Tells ft_launcher of this rank's sections and of their limits; a Monitor."""

    def __init__(self, limits: "Limits"):
        self._limits = limits
        self._told = {name: limits.of(name, "setup") for name in NAMES}
        self._client = import_module(f"{PACKAGE}.fault_tolerance").RankMonitorClient()
        self._tell()
        self._client.init_workload_monitoring(num_warmup_iters=0)

    def start(self, section: str, phase: str, iteration: int) -> None:
        """Have a section watched, with the limit that it has now."""
        limit = self._limits.of(section, phase)
        if self._told[section] != limit:
            self._told[section] = limit
            self._tell()
        self._client.start_section(section)

    def end(self, section: str, *, is_whole: bool) -> None:
        """Have it watched no longer."""
        self._client.end_section(section)

    def learn(self, longest: dict[str, float]) -> None:
        """Leave it to the built-in watchdog, whose limits these are."""

    def close(self) -> None:
        """Have nothing watched any more."""
        self._client.shutdown_workload_monitoring()

    def _tell(self) -> None:
        """Set the limits, as the package does for those that it has calculated itself.

        Its own calculation knows no least limit: a section of milliseconds would get one of
        milliseconds.
        """
        limits = {name: limit + LATER for name, limit in self._told.items()}
        outside = self._limits.outside + LATER
        section = {
            "section": {**limits, BETWEEN: outside},
            "out_of_section": outside,
            "calculated_sections": list(limits),
            "is_out_of_section_calculated": True,
        }
        self._client.load_state_dict({"current_timeouts": {"section": section}})


def launcher_words(settings: Settings) -> list[str]:
    """Return what ft_launcher is given, until its ranks tell it what they learned."""
    resilience = settings.resilience
    if resilience.watchdog == "never":
        return []
    first = resilience.first_timeout
    limits = {name: float(resilience.timeouts.get(name, first)) + LATER for name in NAMES}
    limits[BETWEEN] = first + LATER
    return [
        "--ft-rank-section-timeouts=" + ",".join(f"{name}:{s:g}" for name, s in limits.items()),
        f"--ft-rank-out-of-section-timeout={first + LATER:g}",
        f"--ft-workload-check-interval={CHECK:g}",
        "--ft-max-no-progress-cycles=0",  # a run counts its idle attempts itself
    ]


def main(arguments: list[str]) -> int:
    """Print ft_launcher's words for what `agrpo train` is given; returns the exit status."""
    words = [word for word in arguments if not word.startswith("-")]
    if not words:
        print("usage: python -m agrpo_megatron.resilience.nvrx FILE [KEY=VALUE ...]")
        return 2
    try:
        settings = load(Settings, words[0], words[1:])
    except (OSError, ValueError) as error:
        print(f"agrpo: error: {error}", file=sys.stderr)
        return 2
    for word in launcher_words(settings):
        print(word)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
