"""Rules of a run whose model attends by blocks and decodes one after another."""

from agrpo_megatron.config.settings import Settings


def validate_blocks(settings: Settings) -> None:
    """Check that layouts, kernels and samplers fit a block model.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    by = f"model.attention={settings.model.attention}"
    layouts = (("parallel.", settings.parallel), ("rollout.parallel: ", settings.rollout_layout))
    for key, parallel in layouts:
        if parallel.context > 1:
            raise ValueError(
                f"{key}context={parallel.context} shares a row among ranks, and {by} needs whole "
                "rows on each; use context=1"
            )
    if settings.kernels.cuda_graphs:
        raise ValueError(
            f"kernels.cuda_graphs=true replays forwards of whole rows, and {by} decodes block "
            "after block; use kernels.cuda_graphs=false"
        )
    if settings.sampling.schedule == "dream":
        raise ValueError(
            f"sampling.schedule=dream decodes the completion as one block, and {by} decodes "
            "block after block; use uniform"
        )
    _check_samplers(settings, by)


def _check_samplers(settings: Settings, by: str) -> None:
    """Check orders and block lengths of rollouts and evaluations."""
    length = settings.model.block_length
    samplers = {"sampling": settings.sampling, "evaluation": settings.evaluation_sampling}
    for section, sampling in samplers.items():
        if sampling.unmasking == "bernoulli":
            raise ValueError(
                f"{section}.unmasking=bernoulli takes its rates from Dream's time, and {by} has "
                "steps of each block; use random"
            )
        if sampling.block_length != length:
            raise ValueError(
                f"{section}.block_length={sampling.block_length} differs from model.block_length="
                f"{length}, and {by} decodes the blocks that it attends by; use {length}"
            )
