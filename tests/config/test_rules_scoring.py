"""What is scored of a step needs what the sampler records, or is refused in one line."""

from dataclasses import replace

import pytest

from agrpo_megatron.config.rules_algorithm import validate_algorithm
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings, Settings

RECORDED = SamplingSettings(
    completion_length=8,
    block_length=8,
    denoising_steps=8,
    unmasking="low_confidence",
    record_drawn=True,
)
REFUSED = {
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
    [{}, {"unmasking": "margin"}, {"threshold": 0.5}, {"threshold": 0.5, "unmasking": "random"}],
)
def test_what_the_sampler_records_is_scored(name, changed):
    algorithm = AlgorithmSettings(name=name, scoring="augmented")
    validate_algorithm(algorithm, replace(RECORDED, **changed))


def test_evaluation_records_nothing():
    settings = load(
        Settings, None, ["sampling.record_drawn=true", "sampling.unmasking=low_confidence"]
    )
    assert settings.sampling.record_drawn and not settings.evaluation_sampling.record_drawn
