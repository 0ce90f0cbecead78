"""Experts have what they need, fit the layout, and are not replayed where they are not known."""

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


SIGMOID = [*EXPERTS, "model.moe.score=sigmoid"]
WRONG = {
    "model.moe.topk=3 is for experts, and model.moe.experts is null": ["model.moe.topk=3"],
    "model.moe.experts=4 needs model.moe.ffn_hidden_size": ["model.moe.experts=4"],
    "model.moe.topk=5 is more than model.moe.experts=4": [*EXPERTS, "model.moe.topk=5"],
    "model.moe.dense_layers=4 leaves none of model.num_layers=4": [
        *EXPERTS,
        "model.moe.dense_layers=4",
    ],
    "model.moe.expert_bias=true is for independent scores": [
        *EXPERTS,
        "model.moe.expert_bias=true",
    ],
    "model.moe.scaling_factor=0 makes every output zero": [*EXPERTS, "model.moe.scaling_factor=0"],
    "model.moe.groups=2 needs model.moe.group_topk": [*EXPERTS, "model.moe.groups=2"],
    "model.moe.groups=4 does not split model.moe.experts=4 into groups of two or more": [
        *(*EXPERTS, "model.moe.groups=4", "model.moe.group_topk=2"),
    ],
    "model.moe.group_topk=1 must be at most model.moe.groups=2, and hold model.moe.topk=3": [
        *(*EXPERTS, "model.moe.groups=2", "model.moe.group_topk=1", "model.moe.topk=3"),
    ],
    "model.moe.block_experts=2 is of the tokens of a block, and model.attention=full": [
        *(*EXPERTS, "model.moe.block_experts=2"),
    ],
    "model.moe.block_experts=1 must be from model.moe.topk=2": [
        *BLOCKS,
        "model.moe.block_experts=1",
    ],
    "model.rotary_fraction=0.1 rotates 3.2 of the 32 numbers": ["model.rotary_fraction=0.1"],
    "model.megatron.moe_router_topk=4 is not passed on; use model.moe.topk": [
        *(*EXPERTS, "model.megatron={moe_router_topk: 4}"),
    ],
    "model.megatron.moe_z_loss_coeff=0.001 has no effect here": [
        *(*EXPERTS, "model.megatron={moe_z_loss_coeff: 0.001}"),
    ],
    "kernels.cuda_graphs=true repeats the shapes of one forward pass": [
        *(*EXPERTS, "kernels.cuda_graphs=true"),
    ],
    "sft.balance_loss=0.1 is for experts": ["sft.balance_loss=0.1"],
    "sft.expert_bias_rate=0.1 moves the biases of experts": [*SIGMOID, "sft.expert_bias_rate=0.1"],
    "parallel.expert=2 shares experts, and model.moe.experts is null": ["parallel=ep2"],
    "parallel.expert=8 does not divide model.moe.experts=4": [*EXPERTS, "parallel=ep8"],
    "parallel.sequence=false with parallel.tensor=2: Megatron's experts need": [
        *(*EXPERTS, "parallel=tp2"),
    ],
    "parallel.expert_tensor=2 is neither 1 nor parallel.tensor=4": [
        *(*EXPERTS, "parallel=tp4-sp-etp2"),
    ],
    "parallel.expert=2 with parallel.virtual=2: ranks of different replicas": [
        *(*EXPERTS, "parallel=pp2-vpp2-ep2"),
    ],
    "parallel.expert=4 x expert_tensor=4 does not divide the 8 ranks": [
        *(*EXPERTS, "parallel=tp4-sp-ep4-etp4"),
    ],
    "rollout.schedule=lockstep runs all groups of a replica at once": [
        *(*EXPERTS, "parallel=pp2-ep2", "rollout.schedule=lockstep"),
    ],
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_setting_of_experts_is_one_line(said):
    with pytest.raises(ValueError, match=".") as error:
        validate(load(Settings, None, ["model.vocab_size=64", *WRONG[said]]), world_size=8)
    message = str(error.value)
    assert message.startswith(said) and "\n" not in message and ("; " in message)


@pytest.mark.parametrize("layout", ["ep4", "tp2-sp-ep4", "tp2-sp-ep2-etp2", "pp2-ep4", "cp2-ep4"])
def test_a_layout_of_experts_fits(layout):
    validate(load(Settings, None, ["model.vocab_size=64", *EXPERTS, f"parallel={layout}"]), 8)
