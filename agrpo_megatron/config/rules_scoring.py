"""Rules of what is scored of a denoising step, and of what the sampler records for it."""

from agrpo_megatron.config.settings.algorithm import AlgorithmSettings
from agrpo_megatron.config.settings.training import SamplingSettings
from agrpo_megatron.config.values import text


def validate_scoring(algorithm: AlgorithmSettings, sampling: SamplingSettings) -> None:
    """Check that the sampler records what the estimator scores of a step.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    if sampling.record_drawn:
        _check_recorded(sampling)
    if algorithm.scoring == "augmented":
        _check_augmented(algorithm, sampling)


def _check_recorded(sampling: SamplingSettings) -> None:
    """Refuse a record of drawn tokens that holds nothing new, or not enough to score them."""
    if sampling.foresees_positions:
        raise ValueError(
            f"sampling.record_drawn=true records tokens that a step puts back, and sampling."
            f"unmasking={sampling.unmasking} draws none; use false, or "
            "sampling.unmasking=low_confidence"
        )
    if sampling.top_k is not None or sampling.top_p < 1:
        raise ValueError(
            f"sampling.record_drawn=true records no candidates, and sampling.top_k="
            f"{text(sampling.top_k)} sampling.top_p={sampling.top_p:g} cut them; use "
            "sampling.top_k=null sampling.top_p=1, or sampling.record_drawn=false"
        )


def _check_augmented(algorithm: AlgorithmSettings, sampling: SamplingSettings) -> None:
    if sampling.foresees_positions:
        raise ValueError(
            f"algorithm.scoring=augmented also scores tokens that a step puts back, and sampling."
            f"unmasking={sampling.unmasking} draws none; use token, which is exact there"
        )
    if not sampling.record_drawn:
        raise ValueError(
            "algorithm.scoring=augmented scores what sampling.record_drawn=true records; set it"
        )
    if algorithm.tail not in (None, "all"):
        raise ValueError(
            f"algorithm.tail={algorithm.tail} counts tokens of the completion, and algorithm."
            "scoring=augmented scores others; use all"
        )
