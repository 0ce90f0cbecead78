"""Experts of rollouts are neither replayed nor compared where updates do not know them."""

import pytest

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings

EXPERTS = ["model.moe.experts=4", "model.moe.ffn_hidden_size=16"]
BLOCKS = [*EXPERTS, "model.attention=block_causal", "model.block_length=32"]
REPLAY = ["algorithm.rollout_experts=replay", "checkpoint.rollouts=false"]


REFUSED = {
    "no experts": (REPLAY, "model.moe.experts is null"),
    "stored rollouts": (
        [*EXPERTS, *REPLAY, "train.from_rollouts=runs/x"],
        "train.from_rollouts=runs/x does not have",
    ),
    "rollouts of earlier attempts": (
        [*EXPERTS, *REPLAY, "checkpoint.rollouts=true"],
        "use checkpoint.rollouts=false",
    ),
    "masks": (
        [*EXPERTS, *REPLAY, "algorithm.name=espo"],
        "has no meaning under algorithm.name=espo",
    ),
    "masked prompts": (
        [*EXPERTS, *REPLAY, "algorithm.name=tracerl", "algorithm.prompt_mask=0.1"],
        "algorithm.prompt_mask=0.1 masks some of them; use 0",
    ),
    "part of a layer recomputed": (
        [
            *(*EXPERTS, *REPLAY, "parallel.pipeline=2"),
            "model.megatron={recompute_granularity: selective, recompute_modules: [moe]}",
        ],
        "use recompute_granularity=full",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_experts_that_are_not_known_are_not_replayed(name):
    overrides, said = REFUSED[name]
    with pytest.raises(ValueError, match="algorithm.rollout_experts=replay") as error:
        validate(load(Settings, None, overrides), world_size=2)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("own", [EXPERTS, BLOCKS, [*EXPERTS, "algorithm.name=tracerl"]])
def test_experts_of_states_that_the_sampler_saw_are_replayed(own):
    validate(load(Settings, None, [*own, *REPLAY]), world_size=2)
