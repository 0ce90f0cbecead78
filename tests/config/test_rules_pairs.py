"""Samplers that reuse keys and rollouts ahead of their update, with each other feature.

A pair is accepted, or refused with the words given here; tests/training/test_pairs.py runs some.
"""

import pytest

from agrpo_megatron.config.rules import validate
from tests.training.tiny import tiny

LIMIT = "algorithm.rollout_correction=2"
MODES = {
    "ahead": ["train.async_steps=1", LIMIT],
    "cached": ["sampling.policy=cached"],
    "approximate": ["sampling.policy=approximate", LIMIT],
    "cached ahead": ["sampling.policy=cached", "train.async_steps=1", LIMIT],
}
EXPERTS = ["model.family=llada_moe", "model.moe.experts=4", "model.moe.ffn_hidden_size=8"]
FEATURES = {
    "adapters": ["lora.rank=2"],
    "merged adapters": ["lora.rank=2", "lora.merge_rollouts=true"],
    "experts": [*EXPERTS, "model.moe.topk=2"],
    "recorded experts": [*EXPERTS, "algorithm.rollout_experts=replay"],
    "blocks": ["model.attention=block_causal", "model.block_length=4"],
    "tp2-sp-pp2": ["parallel=tp2-sp-pp2"],
    "cp2": ["parallel=cp2"],
    "rollouts at tp2": ["rollout.parallel=tp2"],
    "fp8": ["precision=fp8", "model.hidden_size=64", "model.ffn_hidden_size=64"],
    "freed memory": ["rollout.release=optimizer"],
    "all steps": ["algorithm.name=full_trajectory", "algorithm.mc_samples=null"],
    "steps of most entropy": ["algorithm.name=egspo"],
    "means of a step": ["algorithm.name=cj_grpo", "algorithm.mc_samples=null"],
    "masks": ["algorithm.name=diffu_grpo", "algorithm.mc_samples=null"],
    "merged steps": ["algorithm.name=tracerl", "algorithm.mc_samples=null"],
    "pairs of completions": ["algorithm.name=vrpo"],
    "the user's estimator": ["algorithm.name=examples/my_estimator.py:suffixes"],
    "the user's loss": ["algorithm.loss=examples/my_estimator.py:soft_clip"],
    "a ratio of a sequence": ["algorithm.level=sequence"],
    "draws of blocks": ["algorithm.step_sampler=blocks"],
    "measured draws": ["algorithm.mc_samples=auto"],
    "an exact KL": ["algorithm.kl_coefficient=0.1", "algorithm.kl=exact"],
    "drawn positions": [
        "algorithm.scoring=positions",
        "sampling.unmasking=entropy",
        "sampling.position_temperature=0.5",
    ],
    "tokens put back": [
        "algorithm.scoring=augmented",
        "sampling.unmasking=low_confidence",
        "sampling.record_drawn=true",
    ],
    "edits": ["sampling.edit_threshold=0.9", "sampling.block_origin=row"],
    "Dream": ["sampling.schedule=dream", "sampling.block_length=8", "model.shift=true"],
    "dynamic sampling": ["algorithm.resample_rounds=1"],
    "early ends": ["sampling.end_at_stop=true", "train.flops=1e15"],
    "saves in the background": ["checkpoint.background=true"],
    "no stored rollouts": ["checkpoint.rollouts=false"],
    "rollouts of another run": ["train.from_rollouts=elsewhere"],
    "a supervised phase": ["sft.iterations=2"],
    "preferences in front": ["sft.iterations=2", "sft.loss=vrpo", "sft.data=rows.jsonl"],
    "another sampler of evaluations": ["evaluation.block_length=2", "evaluation.denoising_steps=8"],
}
POSITIONS = "rollout_correction=2 is not for algorithm.scoring=positions"
MASKED = "scores states that the sampler did not have, so it is not for sampling.policy="
EVERY = dict.fromkeys(MODES)
OF_AHEAD = ("ahead", "cached ahead")
OF_KEYS = ("cached", "approximate", "cached ahead")
MEANINGLESS = "algorithm.rollout_correction=2 has no meaning under algorithm.name="
REFUSED: dict[str, dict[str, str]] = {
    "recorded experts": {
        **dict.fromkeys(OF_KEYS, "needs the experts of all tokens in every step"),
        "ahead": "which rollouts that checkpoint.rollouts=true stores do not have",
    },
    "blocks": dict.fromkeys(OF_KEYS, "finished blocks never change, and rollout.cached reuses"),
    "cp2": dict.fromkeys(OF_KEYS, "parallel.context=2 shares a row among ranks"),
    "masks": {**dict.fromkeys(OF_KEYS, MASKED), "ahead": MEANINGLESS},
    "merged steps": {**dict.fromkeys(OF_KEYS, MASKED), "ahead": MEANINGLESS},
    "pairs of completions": {**dict.fromkeys(OF_KEYS, MASKED), "ahead": MEANINGLESS},
    "the user's estimator": dict.fromkeys(OF_AHEAD, "does not compare log-probs with the sampler"),
    "drawn positions": dict.fromkeys(("ahead", "approximate", "cached ahead"), POSITIONS),
    "edits": dict.fromkeys(EVERY, "is for the decoding of models with blocks"),
    "dynamic sampling": dict.fromkeys(OF_AHEAD, "chooses by rewards what is sampled next"),
    "no stored rollouts": dict.fromkeys(OF_AHEAD, "needs checkpoint.rollouts=true"),
    "rollouts of another run": dict.fromkeys(OF_AHEAD, "which samples nothing"),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_each_pair_is_accepted_or_refused_with_a_reason(feature):
    refused = REFUSED.get(feature, {})
    for mode, own in MODES.items():
        settings = tiny(*own, *FEATURES[feature])
        if mode not in refused:
            validate(settings, world_size=4)
            continue
        with pytest.raises(ValueError, match=r"[;,] (or )?use ") as error:
            validate(settings, world_size=4)
        assert refused[mode] in str(error.value), mode
