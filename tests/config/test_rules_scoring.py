"""What is scored of a step needs what the sampler records, or is refused in one line."""

from dataclasses import replace

import pytest

from agrpo_megatron.config.rules import validate_sampling
from agrpo_megatron.config.rules.algorithm import validate_algorithm
from agrpo_megatron.config.rules.blocks import ACROSS
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings, Settings
from agrpo_megatron.config.settings.estimators import ENTRIES

RECORDED = SamplingSettings(
    completion_length=8,
    block_length=8,
    denoising_steps=8,
    unmasking="low_confidence",
    record_drawn=True,
)
BY_ENTROPY = {"unmasking": "entropy", "position_temperature": 0.5, "record_drawn": False}
EDITED = {"edit_threshold": 0.9, "block_origin": "row", "record_drawn": False}
NOT_FOR_EDITS = "it is not for sampling.edit_threshold=0.9; use "
REFUSED = {
    "steps without edits": (
        {},
        {"edit_steps": 3},
        "sampling.edit_steps=3 has no meaning without sampling.edit_threshold; set it, for example "
        "to 0.9, or use 16",
    ),
    "edits in blocks of the completion": (
        {},
        EDITED | {"block_origin": "completion"},
        f"{NOT_FOR_EDITS}sampling.block_origin=row, or sampling.edit_threshold=null",
    ),
    "edits to the mask token": (
        {},
        EDITED | {"forbid_mask_token": False},
        f"{NOT_FOR_EDITS}sampling.forbid_mask_token=true",
    ),
    "edits and drawn positions": (
        {},
        EDITED | BY_ENTROPY,
        f"{NOT_FOR_EDITS}sampling.position_temperature=null",
    ),
    "edits and one token a step": (
        {"name": "just_grpo"},
        EDITED | {"unmasking": "leftmost"},
        f"{NOT_FOR_EDITS}algorithm.name=full_trajectory",
    ),
    "positions by confidence": (
        {},
        BY_ENTROPY | {"unmasking": "low_confidence"},
        "sampling.unmasking=low_confidence takes others; use entropy, or",
    ),
    "positions by threshold": (
        {},
        BY_ENTROPY | {"threshold": 0.5},
        "sampling.threshold=0.5 fixes others; use null",
    ),
    "tokens that say nothing": (
        {},
        BY_ENTROPY | {"record_drawn": True},
        "records tokens that say nothing; use false",
    ),
    "no drawn positions": (
        {"scoring": "positions"},
        {},
        "scores positions that sampling.position_temperature draws; set it",
    ),
    "weights of tokens": (
        {"scoring": "positions", "name": "cj_grpo"},
        BY_ENTROPY,
        "use agrpo or full_trajectory",
    ),
    "cut entropies": (
        {"scoring": "positions"},
        BY_ENTROPY | {"top_p": 0.9},
        "use sampling.top_k=null sampling.top_p=1",
    ),
    "a ratio of a step": (
        {"scoring": "positions", "level": "row"},
        BY_ENTROPY,
        "algorithm.level=row is not for algorithm.scoring=positions",
    ),
    "positions of the model": (
        {"scoring": "positions", "scored_policy": "model"},
        BY_ENTROPY,
        "use sampler",
    ),
    "corrected positions": (
        {"scoring": "positions", "rollout_correction": 2.0},
        BY_ENTROPY,
        "algorithm.rollout_correction=2 is not for algorithm.scoring=positions",
    ),
    "a record of no more": (
        {},
        {"unmasking": "random"},
        "and sampling.unmasking=random draws none; use false, or sampling.unmasking=low_confidence",
    ),
    "candidates": ({}, {"top_k": 5}, "use sampling.top_k=null sampling.top_p=1, or sampling."),
    "no record": (
        {"scoring": "augmented"},
        {"record_drawn": False},
        "scores what sampling.record_drawn=true records; set it",
    ),
    "nothing put back": (
        {"scoring": "augmented"},
        {"record_drawn": False, "unmasking": "leftmost"},
        "sampling.unmasking=leftmost draws none; use token",
    ),
    "another estimator": (
        {"scoring": "augmented", "name": "espo"},
        {},
        "algorithm.scoring=augmented has no meaning under algorithm.name=espo; use token, or "
        "algorithm.name=agrpo or cj_grpo or full_trajectory",
    ),
    "tokens of the completion": (
        {"scoring": "augmented", "name": "cj_grpo", "tail": "first"},
        {},
        "algorithm.tail=first counts tokens of the completion",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused(case):
    algorithm, sampling, said = REFUSED[case]
    with pytest.raises(ValueError, match=r"algorithm|sampling") as error:
        validate_algorithm(AlgorithmSettings(**algorithm), replace(RECORDED, **sampling))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["agrpo", "full_trajectory", "cj_grpo"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"unmasking": "margin"},
        {"threshold": 0.5},
        {"threshold": 0.5, "unmasking": "random"},
        {"edit_threshold": 0.9, "block_origin": "row"},
    ],
)
def test_what_the_sampler_records_is_scored(name, changed):
    algorithm = AlgorithmSettings(name=name, scoring="augmented")
    validate_algorithm(algorithm, replace(RECORDED, **changed))


@pytest.mark.parametrize("name", ["agrpo", "full_trajectory"])
def test_drawn_positions_are_scored_or_only_their_tokens(name):
    for scoring in ("positions", "token"):
        algorithm = AlgorithmSettings(name=name, scoring=scoring)
        validate_algorithm(algorithm, replace(RECORDED, **BY_ENTROPY))


@pytest.mark.parametrize("name", sorted(set(ENTRIES) - {"just_grpo", *ACROSS}))
def test_edits_are_scored_or_left_to_the_final_text(name):
    validate_algorithm(AlgorithmSettings(name=name), replace(RECORDED, **EDITED))


def test_evaluation_edits_as_the_rollouts_do():
    settings = load(Settings, None, ["sampling.edit_threshold=0.8", "sampling.edit_steps=2"])
    assert settings.evaluation_sampling.edit_threshold == 0.8
    assert settings.evaluation_sampling.edit_steps == 2
    with pytest.raises(ValueError, match=r"^sampling.edit_threshold=0.8 is a probability") as error:
        validate_sampling(replace(settings.evaluation_sampling, unmasking="margin"), "evaluation")
    assert str(error.value).endswith(
        "evaluation.unmasking=margin does not rank by it; use low_confidence, or null"
    )


def test_evaluation_draws_no_positions_and_records_nothing():
    changed = ["sampling.record_drawn=true", "sampling.position_temperature=0.5"]
    settings = load(Settings, None, changed)
    assert settings.sampling.record_drawn and settings.sampling.position_temperature == 0.5
    assert not settings.evaluation_sampling.record_drawn
    assert settings.evaluation_sampling.position_temperature is None
