"""Rules of the profiler: its iterations and ranks exist, and its settings have an effect."""

from dataclasses import fields

from agrpo_megatron.config.settings import ProfileSettings, Settings
from agrpo_megatron.config.values import text


def validate_profile(settings: Settings, world_size: int) -> None:
    """Check the profiler of a run that trains on so many ranks.

    Raises:
        ValueError: a setting would have no effect, or an iteration or a rank does not exist.
    """
    profile, usual = settings.profile, ProfileSettings()
    if profile.start is None:
        for name in (field.name for field in fields(profile)):
            if (value := getattr(profile, name)) != getattr(usual, name):
                raise ValueError(
                    f"profile.{name}={text(value)} needs profile.start, the first iteration to "
                    "profile; use for example profile.start=3"
                )
        return
    phases = {
        "sft": ("sft.iterations", settings.sft.iterations),
        "rl": ("train.iterations", settings.train.iterations),
    }
    key, made = phases[profile.phase]
    # Without the data a plan does not know what epochs make.
    is_unknown = profile.phase == "sft" and made == 0 and settings.sft.epochs is not None
    made = profile.start + profile.iterations if is_unknown else made
    if profile.start > made:
        raise ValueError(
            f"profile.start={profile.start} is after the last iteration of profile.phase="
            f"{profile.phase}, {key}={made}; use an earlier iteration, or the other phase"
        )
    if profile.start + profile.iterations - 1 > made:
        raise ValueError(
            f"profile.iterations={profile.iterations} from profile.start={profile.start} goes past "
            f"{key}={made}; use at most {made - profile.start + 1}"
        )
    if profile.memory and profile.tool == "nsys":
        raise ValueError(
            "profile.memory=true has no effect with profile.tool=nsys; use torch, or "
            "profile.memory=false with `nsys profile --cuda-memory-usage true`"
        )
    _validate_ranks(profile.ranks, world_size)


def _validate_ranks(ranks: list[int] | None, world_size: int) -> None:
    if ranks == []:
        raise ValueError("profile.ranks=[] profiles no rank; use null for rank 0")
    strange = [rank for rank in ranks or [] if not 0 <= rank < world_size]
    if strange:
        raise ValueError(
            f"profile.ranks={text(ranks)} names rank {strange[0]}, and the run has "
            f"{world_size}; use 0 to {world_size - 1}, or null for rank 0"
        )
