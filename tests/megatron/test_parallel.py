"""The groups of the layout that Megatron does not make."""

from agrpo_megatron.config.settings import ParallelSettings, RunSettings, Settings
from agrpo_megatron.megatron.parallel import start_ranks, stop_ranks
from tests.ranks import run_ranks


def _timeouts():
    """Return the longest waits, in seconds, of the groups that are not made by Megatron."""
    settings = Settings(
        run=RunSettings(timeout=77, threads=1), parallel=ParallelSettings(pipeline=2)
    )
    ranks = start_ranks(settings)
    groups = (ranks.returning, ranks.replica)
    backends = [group._get_backend(ranks.device) for group in groups if group is not None]
    stop_ranks()
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_groups_of_our_own_wait_as_long_as_the_run_says():
    assert run_ranks(2, _timeouts) == 2 * [2 * [77.0]]
