"""What a block model is refused, key by key; a model that attends to whole rows may have it."""

import pytest

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings

BLOCKS = ["model.attention=block_causal", "model.block_length=4"]
SAMPLING = ["sampling.completion_length=16", "sampling.block_length=4"]
SAMPLING += ["sampling.denoising_steps=16"]
WHOLE = ["sampling.schedule=dream", "sampling.block_length=16"]


def _refusal(*overrides, world_size=1):
    with pytest.raises(ValueError, match="model.attention=block_causal") as error:
        validate(load(Settings, None, [*BLOCKS, *SAMPLING, *overrides]), world_size)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_blocks_of_the_model_are_the_blocks_that_are_decoded():
    validate(load(Settings, None, [*BLOCKS, *SAMPLING]))
    validate(load(Settings, None, [*BLOCKS, *SAMPLING, "evaluation.block_length=4"]))
    assert _refusal("sampling.block_length=8") == (
        "sampling.block_length=8 differs from model.block_length=4, and model.attention="
        "block_causal decodes the blocks that it attends by; use 4"
    )
    said = _refusal("evaluation.block_length=8")
    assert said.startswith("evaluation.block_length=8 differs from model.block_length=4, and ")


REFUSED = {
    "context": (["parallel=cp2"], "parallel.context=2 shares a row among ranks", "context=1"),
    "context of rollouts": (
        ["rollout.parallel=cp2"],
        "rollout.parallel: context=2 shares a row among ranks",
        "context=1",
    ),
    "graphs": (
        ["kernels.cuda_graphs=true", "precision=bf16"],
        "kernels.cuda_graphs=true replays forwards of whole rows",
        "kernels.cuda_graphs=false",
    ),
    "batch invariance": (
        ["kernels.batch_invariant=true", "precision=bf16", "kernels.layer_spec=te"],
        "kernels.batch_invariant=true has no attention for model.attention",
        "kernels.batch_invariant=false",
    ),
    "states across blocks": (
        ["algorithm.name=tracerl"],
        "algorithm.name=tracerl scores tokens from a state in which earlier blocks are masked",
        "agrpo, full_trajectory, just_grpo, block_just_grpo, cj_grpo, egspo, diffu_grpo, wd1, "
        "unigrpo, coupled_grpo, spg, gdpo, espo, vrpo, bgpo",
    ),
    "shift": (
        ["model.shift=true"],
        "model.shift=true predicts a token from the one before",
        "model.shift=false",
    ),
    "Dream's schedule": (WHOLE, "sampling.schedule=dream decodes the completion as one", "uniform"),
    "Dream's order": (
        ["sampling.unmasking=bernoulli"],
        "sampling.unmasking=bernoulli takes its rates from Dream's time",
        "random",
    ),
    "Dream's order of evaluation": (
        ["evaluation.unmasking=bernoulli"],
        "evaluation.unmasking=bernoulli takes its rates from Dream's time",
        "random",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_block_models_lack_is_refused_with_its_key_and_a_fix(name):
    overrides, said, fix = REFUSED[name]
    message = _refusal(*overrides, world_size=2)
    assert message.startswith(said) and message.endswith(f"; use {fix}")


def test_edits_are_for_models_with_blocks():
    edits = ["sampling.edit_threshold=0.9", "sampling.block_origin=row"]
    validate(load(Settings, None, [*BLOCKS, *SAMPLING, *edits]))
    with pytest.raises(ValueError, match="edit") as error:
        validate(load(Settings, None, [*SAMPLING, *edits]))
    assert str(error.value) == (
        "sampling.edit_threshold=0.9 is for the decoding of models with blocks, and "
        "model.attention is full; use null"
    )


@pytest.mark.parametrize("name", [name for name in REFUSED if "order" not in name])
def test_the_same_is_accepted_of_a_model_of_full_attention(name):
    validate(load(Settings, None, [*SAMPLING, *REFUSED[name][0]]), world_size=2)
