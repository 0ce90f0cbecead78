"""The policy gradient's settings are used by the estimator and the loss, or refused in one line."""

from dataclasses import replace

import pytest

from agrpo_megatron.config.rules.algorithm import validate_algorithm
from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.config.settings.estimators import ENTRIES, LOSSES
from agrpo_megatron.estimators.losses import LOSSES as LOSS_FUNCTIONS
from agrpo_megatron.estimators.table import ESTIMATORS

SAMPLING = SamplingSettings(completion_length=8, block_length=8, denoising_steps=8)
LEFTMOST = SamplingSettings(
    completion_length=8, block_length=8, denoising_steps=8, unmasking="leftmost"
)
REFUSED = {
    "no such name": ({"name": "grpo"}, "your FILE.py:FUNCTION; did you mean agrpo?"),
    "no such loss": ({"loss": "ppo"}, "algorithm.loss=ppo must be one of policy"),
    "no such file": ({"name": "none.py:own"}, "none.py cannot be read"),
    "draws of another": ({"name": "spg", "proposal": "entropy"}, "or algorithm.name=agrpo"),
    "masks of another": ({"states": "full"}, "use null, or algorithm.name=diffu_grpo"),
    "one mask": ({"name": "diffu_grpo", "mc_samples": 2}, "algorithm.mc_samples=2 has no meaning"),
    "auto for masks": (
        {"name": "espo", "mc_samples": "auto"},
        "measures the drawn steps of algorithm.name=agrpo, and algorithm.name=espo; use null",
    ),
    "auto for all steps": ({"name": "full_trajectory", "mc_samples": "auto"}, "use null"),
    "auto of one problem": (
        {"mc_samples": "auto", "prompts_per_iteration": 1},
        "algorithm.prompts_per_iteration=1; use at least 2, or a number of draws",
    ),
    "auto of blocks": (
        {"mc_samples": "auto", "step_sampler": "blocks"},
        "step_sampler=blocks draws whole blocks; use a number of draws, or distinct",
    ),
    "a share of nothing": ({"auto_share": 0.1}, "no meaning without algorithm.mc_samples=auto"),
    "clip without ratio": ({"name": "wd1", "clip_low": 0.1}, "under algorithm.loss=reinforce"),
    "a KL with a bound": ({"name": "spg", "kl_coefficient": 0.1}, "kl_coefficient=0.1 has no"),
    "baseline of a pair": ({"name": "vrpo", "baseline": "none"}, "baseline=none has no meaning"),
    "rows of another": ({"loss": "filtered"}, "needs the rows of algorithm.name=rldf"),
    "pairs of steps": ({"loss": "preference"}, "needs the rows of algorithm.name=diffu_grpo or"),
    "another loss": ({"name": "rldf", "loss": "policy"}, "is not for algorithm.name=rldf"),
    "level": ({"name": "tracerl", "level": "row"}, "level=row is not for algorithm.name=tracerl"),
    "scaled tokens": ({"length_scale": True}, "algorithm.level=token; use false"),
    "summed KL": ({"name": "espo", "kl_sum": True}, "kl_sum=true is for algorithm.level=token"),
    "tokens of a sequence": ({"name": "espo", "normaliser": "tokens"}, "each rollout counts once"),
    "rows of steps": ({"normaliser": "rows"}, "is not for algorithm.name=agrpo; use live_steps"),
    "no constant": ({"normaliser_constant": 3.0}, "is for algorithm.normaliser=constant"),
    "rates": ({"name": "unigrpo", "mask_low": 0.95}, "above algorithm.mask_high=0.9"),
    "segments": ({"name": "step_merge", "mc_samples": 9}, "use at most 8"),
    "corrected masks": ({"name": "espo", "rollout_correction": 2.0}, "has no meaning under"),
    "corrected model": (
        {"scored_policy": "model", "rollout_correction": 2.0},
        "algorithm.scored_policy=model scores others",
    ),
    "no deviation": ({"std_floor": 0.1}, "no meaning without algorithm.scale_by_std=true; use 0"),
    "no softmax": ({"softmax_negative": False}, "no meaning without algorithm.softmax=group"),
    "no tail": ({"name": "vrpo", "cut_tail": True}, "use algorithm.tail=first"),
    "exact KL to the old": (
        {"name": "unigrpo", "kl": "exact", "kl_target": "old"},
        "algorithm.kl_target=old has only log-probs; use algorithm.kl=k3",
    ),
    "exact KL of tails": ({"name": "rldf", "kl": "exact"}, "loss=filtered has only log-probs"),
    "joined rows": (
        {"name": "coupled_grpo", "states": "coupled_and_full", "normaliser": "rows"},
        "normaliser=rows has no meaning under algorithm.states=coupled_and_full",
    ),
    "order": ({"name": "just_grpo"}, "use sampling.unmasking=leftmost"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused(case):
    changed, said = REFUSED[case]
    with pytest.raises(ValueError, match="algorithm") as error:
        validate_algorithm(AlgorithmSettings(**changed), SAMPLING)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_whole_blocks_of_one_block_are_refused():
    algorithm = AlgorithmSettings(mc_samples=2, step_sampler="blocks")
    whole = replace(SAMPLING, block_length=SAMPLING.completion_length)
    with pytest.raises(ValueError, match=r"step_sampler=blocks draws .* use algorithm\.step_s"):
        validate_algorithm(algorithm, whole)
    validate_algorithm(algorithm, replace(whole, block_length=SAMPLING.completion_length // 2))


def test_an_exact_kl_is_refused_where_tokens_are_cut():
    algorithm, cut = AlgorithmSettings(kl="exact"), replace(SAMPLING, top_k=5)
    with pytest.raises(ValueError, match=r"sampling.top_k=5 sampling.top_p=1 keep some; use"):
        validate_algorithm(algorithm, cut)
    validate_algorithm(replace(algorithm, scored_policy="model"), cut)
    validate_algorithm(algorithm, SAMPLING)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_entrys_own_values_are_accepted_when_they_are_written(name):
    sampling = LEFTMOST if name == "just_grpo" else SAMPLING
    validate_algorithm(AlgorithmSettings(name=name), sampling)
    validate_algorithm(AlgorithmSettings(name=name).filled, sampling)


def test_every_name_has_an_estimator_and_every_loss_a_function():
    assert list(ENTRIES) == list(ESTIMATORS)
    assert list(LOSSES) == list(LOSS_FUNCTIONS)


def test_a_file_needs_the_function_that_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def first(rollout, context):\n    pass\n")
    validate_algorithm(AlgorithmSettings(name=f"{path}:first", mc_samples=3), SAMPLING)
    for wrong in (f"{path}:second", str(path)):
        with pytest.raises(ValueError, match=r"name one as .*mine.py:FUNCTION; it has first"):
            validate_algorithm(AlgorithmSettings(name=wrong), SAMPLING)
