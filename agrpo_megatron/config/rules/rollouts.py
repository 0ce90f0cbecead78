"""Rules of the rollouts that a run keeps, and of those that it replays."""

import os

from agrpo_megatron.config.settings import Settings


def validate_stored_rollouts(settings: Settings) -> None:
    """Check what a run keeps of its rollouts, and that it does not replay its own.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    checkpoint, source, own = settings.checkpoint, settings.train.from_rollouts, settings.run.dir
    if checkpoint.keep_rollouts and not checkpoint.rollouts:
        raise ValueError(
            "checkpoint.keep_rollouts=true needs checkpoint.rollouts=true, which stores them; set "
            "it, or use checkpoint.keep_rollouts=false"
        )
    if source is None:
        return
    if os.path.realpath(source) == os.path.realpath(own):
        raise ValueError(
            f"train.from_rollouts={source} is the run's own run.dir={own}; choose another run.dir"
        )
    if checkpoint.keep_rollouts:
        raise ValueError(
            f"checkpoint.keep_rollouts=true keeps nothing, as train.from_rollouts={source} samples "
            "nothing; use checkpoint.keep_rollouts=false"
        )
