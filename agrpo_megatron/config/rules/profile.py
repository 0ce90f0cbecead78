"""Rules of the profiler: its iterations and ranks exist."""

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.values import text


def validate_profile(settings: Settings, world_size: int) -> None:
    """Check the profiler of a run that trains on so many ranks.

    Raises:
        ValueError: nothing would be profiled, or a rank does not exist.
    """
    profile = settings.profile
    if profile.start is None:
        return
    made = {"sft": settings.sft.iterations, "rl": settings.train.iterations}[profile.phase]
    if profile.start > made:
        key = "sft.iterations" if profile.phase == "sft" else "train.iterations"
        raise ValueError(
            f"profile.start={profile.start} is after the last iteration of profile.phase="
            f"{profile.phase}, {key}={made}; use an earlier iteration, or the other phase"
        )
    strange = [rank for rank in profile.ranks or [] if not 0 <= rank < world_size]
    if strange:
        raise ValueError(
            f"profile.ranks={text(profile.ranks)} names rank {strange[0]}, and the run has "
            f"{world_size}; use 0 to {world_size - 1}, or null for rank 0"
        )
