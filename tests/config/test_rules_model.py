"""Heads, rotary embeddings and blocks: what fits together, and what is refused."""

import pytest

from agrpo_megatron.config.rules.model import validate_model
from agrpo_megatron.config.settings import ModelSettings


def _refusal(**values):
    with pytest.raises(ValueError, match="^model") as error:
        validate_model(ModelSettings(**values))
    return str(error.value)


def test_a_head_is_as_wide_as_it_says_or_its_share_of_the_width():
    """SDAR-4B: 32 heads of 128 and 8 keys, in a residual stream of 2560."""
    model = ModelSettings(
        hidden_size=2560, num_attention_heads=32, num_query_groups=8, head_dim=128
    )
    assert (model.head_width, model.query_width, model.key_width) == (128, 4096, 1024)
    model = ModelSettings(hidden_size=2560, num_attention_heads=32)
    assert (model.head_width, model.query_width, model.key_width) == (80, 2560, 2560)


def test_heads_divide_the_width_only_without_a_width_of_their_own():
    validate_model(ModelSettings(hidden_size=100, num_attention_heads=8, head_dim=6))
    said = _refusal(hidden_size=100, num_attention_heads=8)
    assert said == "model.num_attention_heads=8 does not divide model.hidden_size=100; use 10"
    said = _refusal(hidden_size=100, num_attention_heads=8, num_query_groups=3, head_dim=6)
    assert said == "model.num_query_groups=3 does not divide model.num_attention_heads=8; use 2"


def test_a_head_of_odd_width_is_refused():
    assert _refusal(head_dim=7) == (
        "model.head_dim=7 is odd, and rotary embeddings turn pairs; use 8"
    )
    assert _refusal(hidden_size=36, num_attention_heads=4) == (
        "model.hidden_size=36 / model.num_attention_heads=4 is odd, and rotary embeddings turn "
        "pairs; use a multiple of 8"
    )


@pytest.mark.parametrize("attention", ["block_causal", "causal_context"])
def test_blocks_have_a_length_and_full_attention_has_none(attention):
    validate_model(ModelSettings(attention=attention, block_length=4))
    assert _refusal(attention=attention) == (
        f"model.attention={attention} needs model.block_length; use for example 4, or "
        "model.attention=full"
    )
    assert _refusal(block_length=4) == (
        "model.block_length=4 is for attention by blocks, and model.attention=full; use null, or "
        "model.attention=block_causal"
    )


YARN = {"rope_factor": 4.0, "rope_original_length": 64}
REFUSED_ROPE = {
    "YaRN without a length": (
        {"rope_factor": 4.0},
        "model.rope_factor=4.0 needs model.rope_original_length; use the longest row that the "
        "weights were first trained for, such as 16384",
    ),
    "scaled queries without a length": (
        {"query_scale_beta": 0.5},
        "model.query_scale_beta=0.5 needs model.rope_original_length; use the longest row that "
        "the weights were first trained for, such as 16384",
    ),
    "a length without either": (
        {"rope_original_length": 64},
        "model.rope_original_length=64 is for model.rope_factor and model.query_scale_beta, and "
        "neither is set; use null, or set one of them",
    ),
    "a beta without YaRN": (
        {"rope_beta_slow": 2.0},
        "model.rope_beta_slow=2.0 is for YaRN, and model.rope_factor=1; use 1.0, or set "
        "model.rope_factor",
    ),
    "betas in the wrong order": (
        {**YARN, "rope_beta_fast": 0.5},
        "model.rope_beta_fast=0.5 is less than model.rope_beta_slow=1.0; exchange them",
    ),
    "all pairs alike": (
        {**YARN, "rope_theta": 1.0},
        "model.rope_theta=1 turns all pairs alike, and model.rope_factor=4.0 scales slow ones; "
        "use for example 10000, or model.rope_factor=1",
    ),
}


@pytest.mark.parametrize("name", REFUSED_ROPE)
def test_a_rotary_embedding_that_lacks_or_ignores_a_setting_is_refused(name):
    values, said = REFUSED_ROPE[name]
    assert _refusal(**values) == said


@pytest.mark.parametrize(
    "values",
    [
        YARN,
        {**YARN, "query_scale_beta": 0.1, "rope_beta_fast": 8.0, "rope_beta_slow": 8.0},
        {"rope_original_length": 64, "query_scale_beta": 0.1},
        {"rope_attention_factor": 1.5},
    ],
    ids=str,
)
def test_rotary_embeddings_may_be_scaled_in_part(values):
    validate_model(ModelSettings(**values))
