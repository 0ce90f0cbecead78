"""Rules of what is scored of a denoising step, and of what the sampler records for it."""

from agrpo_megatron.config.settings.algorithm import AlgorithmSettings
from agrpo_megatron.config.settings.sampling import SamplingSettings
from agrpo_megatron.config.values import text


def validate_scoring(algorithm: AlgorithmSettings, sampling: SamplingSettings) -> None:
    """Check that the sampler records what the estimator scores of a step.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    if sampling.position_temperature is not None:
        _check_positions(sampling.position_temperature, sampling)
    if sampling.record_drawn:
        _check_recorded(sampling)
    _check_edits(algorithm, sampling)
    if algorithm.scoring == "augmented":
        _check_augmented(algorithm, sampling)
    if algorithm.scoring == "positions":
        _check_turns(algorithm, sampling)


def _check_positions(temperature: float, sampling: SamplingSettings) -> None:
    """Refuse to draw positions by what other orders rank by."""
    said = f"sampling.position_temperature={temperature:g} draws positions by their entropies"
    if sampling.unmasking != "entropy":
        raise ValueError(
            f"{said}, and sampling.unmasking={sampling.unmasking} takes others; use entropy, or "
            "sampling.position_temperature=null"
        )
    if sampling.threshold is not None:
        raise ValueError(
            f"{said}, and sampling.threshold={sampling.threshold:g} fixes others; use null"
        )
    if sampling.record_drawn:
        raise ValueError(
            f"{said}, whatever tokens are put back, so sampling.record_drawn=true records tokens "
            "that say nothing; use false"
        )


def _check_recorded(sampling: SamplingSettings) -> None:
    """Refuse a record of drawn tokens that holds nothing new, or not enough to score them."""
    if sampling.foresees_positions:
        raise ValueError(
            f"sampling.record_drawn=true records tokens that a step puts back, and sampling."
            f"unmasking={sampling.unmasking} draws none; use false, or "
            "sampling.unmasking=low_confidence"
        )
    if sampling.is_cut:
        raise ValueError(
            f"sampling.record_drawn=true records no candidates, and sampling.top_k="
            f"{text(sampling.top_k)} sampling.top_p={sampling.top_p:g} cut them; use "
            "sampling.top_k=null sampling.top_p=1, or sampling.record_drawn=false"
        )


def _check_edits(algorithm: AlgorithmSettings, sampling: SamplingSettings) -> None:
    """Refuse edits where the record of a step, or an estimator, has no place for them."""
    if sampling.edit_threshold is None:
        if sampling.edit_steps != SamplingSettings.edit_steps:
            raise ValueError(
                f"sampling.edit_steps={sampling.edit_steps} has no meaning without sampling."
                f"edit_threshold; set it, for example to 0.9, or use {SamplingSettings.edit_steps}"
            )
        return
    refused = {
        "sampling.block_origin=completion": (
            sampling.block_origin == "completion",
            "counts blocks from the completion, and models that edit from the row's first token",
            "sampling.block_origin=row",
        ),
        "sampling.forbid_mask_token=false": (
            not sampling.forbid_mask_token,
            "lets an edit put the mask token in place of a fixed one",
            "sampling.forbid_mask_token=true",
        ),
        f"sampling.position_temperature={sampling.position_temperature}": (
            sampling.position_temperature is not None,
            "draws the positions of a step, and edits are not drawn",
            "sampling.position_temperature=null",
        ),
        "algorithm.name=just_grpo": (
            algorithm.name == "just_grpo",
            "scores one token a step, from those on its left, and an edit is another action",
            "algorithm.name=full_trajectory",
        ),
    }
    for said, (is_refused, why, fix) in refused.items():
        if is_refused:
            raise ValueError(
                f"{said} {why}: it is not for sampling.edit_threshold="
                f"{sampling.edit_threshold:g}; use {fix}, or sampling.edit_threshold=null"
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


def _check_turns(algorithm: AlgorithmSettings, sampling: SamplingSettings) -> None:
    said = "algorithm.scoring=positions"
    if sampling.position_temperature is None:
        raise ValueError(
            f"{said} scores positions that sampling.position_temperature draws; set it, for "
            "example to 0.5, and sampling.unmasking=entropy"
        )
    if algorithm.name == "cj_grpo":
        raise ValueError(
            f"{said} weighs a step's positions as its tokens, and algorithm.name=cj_grpo weighs "
            "each token; use agrpo or full_trajectory"
        )
    if sampling.is_cut:
        raise ValueError(
            f"{said} needs the entropies of all masked positions, and sampling.top_k="
            f"{text(sampling.top_k)} sampling.top_p={sampling.top_p:g} cut candidates that are "
            "stored of fixed tokens only; use sampling.top_k=null sampling.top_p=1"
        )
    only = {"level": "token", "scored_policy": "sampler", "rollout_correction": None}
    for key, value in only.items():
        if (found := getattr(algorithm, key)) not in (None, value):
            raise ValueError(
                f"algorithm.{key}={text(found)} is not for {said}, whose positions have a ratio "
                f"of their own, of the sampler; use {text(value)}, or algorithm.scoring=token"
            )
