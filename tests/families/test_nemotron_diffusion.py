"""Nemotron-Labs-Diffusion: config.json of each size, tensors, and rotary embeddings."""

import json
import math
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import FAMILIES, hf_shapes, settings_from_hf
from agrpo_megatron.families.tensors import with_values
from tests.families.nemotron import PUBLISHED, ROPE, TINY, shapes

# 3B is published so; 8B and 14B as the tests of other programs repeat them.
SIZES = {
    "3B": {},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34},
    "14B": {
        "hidden_size": 5120,
        "intermediate_size": 16384,
        "num_hidden_layers": 40,
        "rope_parameters": {**ROPE, "rope_theta": 1e9},
    },
}
FAMILY = FAMILIES["nemotron_diffusion"]


def _read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return settings_from_hf(folder)


def _rope(folder, changes, **others):
    rope = {key: value for key, value in {**ROPE, **changes}.items() if value is not ...}
    return _read(folder, {**PUBLISHED, "rope_parameters": rope, **others})


@pytest.mark.parametrize("size", SIZES)
def test_a_config_of_each_size_becomes_settings(tmp_path, size):
    config = {**PUBLISHED, **SIZES[size]}
    assert _read(tmp_path, config) == ModelSettings(
        family="nemotron_diffusion",
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=131072,
        mask_token_id=100,
        eos_token_id=11,
        max_sequence_length=262144,
        rope_theta=1e9 if size == "14B" else 1e6,
        rope_factor=16.0,
        rope_original_length=16384,
        query_scale_beta=0.1,
        norm_epsilon=1e-5,
        attention="causal_context",
        block_length=32,
    )


@pytest.mark.parametrize(("size", "count"), [("3B", 237), ("8B", 309), ("14B", 363)])
def test_each_size_has_its_number_of_tensors(tmp_path, size, count):
    """Source: the 14B checkpoint's header, as a test of fluxserve counts it: nine a layer and 3."""
    found = hf_shapes(_read(tmp_path, {**PUBLISHED, **SIZES[size]}))
    assert len(found) == count
    hidden = {**PUBLISHED, **SIZES[size]}["hidden_size"]
    assert found["encoder.layers.25.self_attn.o_proj.weight"] == (hidden, 4096)
    assert found["diffusion_head.weight"] == (131072, hidden)


@pytest.mark.parametrize(("size", "downloaded"), [("8B", 15.95), ("14B", 25.33)])
def test_the_tensors_have_the_bytes_of_a_download(tmp_path, size, downloaded):
    """GiB, as a list of downloads has them: with an adapter of rank 128 on `o_proj`, in float32."""
    model = _read(tmp_path, {**PUBLISHED, **SIZES[size]})
    weights = 2 * sum(torch.Size(shape).numel() for shape in hf_shapes(model).values())
    adapter = 4 * model.num_layers * 128 * (model.query_width + model.hidden_size)
    assert round((weights + adapter) / 2**30, 2) == downloaded


def test_tensors_have_the_published_names_and_shapes(tmp_path):
    assert hf_shapes(_read(tmp_path, TINY)) == shapes()


def test_yarn_without_scales_has_its_own_attention_factor(tmp_path):
    """0.1 ln 16 + 1; two scales give the ratio of theirs; a written factor is taken."""
    plain = 0.1 * math.log(16) + 1
    none = {"mscale": ..., "mscale_all_dim": ...}
    assert _rope(tmp_path, none).rope_attention_factor == plain
    assert _rope(tmp_path, {"mscale_all_dim": None}).rope_attention_factor == plain
    model = _rope(tmp_path, {"mscale": 2.0})
    assert model.rope_attention_factor == (0.2 * math.log(16) + 1) / plain
    assert _rope(tmp_path, {"attention_factor": 0.5}).rope_attention_factor == 0.5


def test_rotary_embeddings_may_be_plain(tmp_path):
    for rope in (
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "yarn", "factor": 1, "rope_theta": 5e5, "llama_4_scaling_beta": 0},
    ):
        model = _read(tmp_path, {**PUBLISHED, "rope_parameters": rope})
        assert (model.rope_theta, model.rope_factor, model.query_scale_beta) == (5e5, 1, 0)
        assert model.rope_original_length is None and model.rope_attention_factor == 1


def test_queries_may_be_scaled_without_yarn(tmp_path):
    model = _rope(tmp_path, {"rope_type": "default"})
    assert (model.rope_factor, model.query_scale_beta, model.rope_original_length) == (
        1,
        0.1,
        16384,
    )


TAKEN = {
    "both names of the type": {"rope_parameters": {**ROPE, "type": "yarn"}},
    "copies under older names": {"rope_scaling": ROPE, "rope_theta": 1e6},
    "the older name alone": {"rope_scaling": ROPE, "rope_parameters": None},
    "the usual rounding": {"rope_parameters": {**ROPE, "truncate": True}},
    "as Ministral 3 writes it": {"rope_parameters": {**ROPE, "max_position_embeddings": 262144}},
    "trained blocks": {"dlm_paradigm": "block_diff", "dlm_loss_weight": 0.3},
    "no paradigm": {"dlm_paradigm": None},
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_changes_no_logits_is_taken(tmp_path, name):
    unchanged = _read(tmp_path, PUBLISHED)
    assert _read(tmp_path, {**PUBLISHED, **TAKEN[name]}) == unchanged


REFUSED = {
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings=True; the nemotron_diffusion f"),
    "a bias": ({"mlp_bias": True}, "mlp_bias=True; the nemotron_diffusion family needs False"),
    "a window": ({"sliding_window": 4096}, "sliding_window=4096 is no key of the nemotron_diff"),
    "a paradigm": ({"dlm_paradigm": "other"}, "dlm_paradigm='other'; the nemotron_diffusion fam"),
    "no rope": ({"rope_parameters": None}, "rope_parameters is missing; the nemotron_diffusion"),
    "two bases": ({"rope_theta": 1e4}, "rope_theta=10000.0 differs from rope_parameters; corre"),
    "two copies": ({"rope_scaling": {}}, "rope_scaling={} differs from rope_parameters; correct"),
    "no mask": ({"mask_token_id": None}, "mask_token_id is missing; the nemotron_diffusion fam"),
    "images": ({"model_type": "nemotron_labs_diffusion_vlm"}, "model_type='nemotron_labs_diffus"),
}
REFUSED_ROPE = {
    "a type": ({"rope_type": "longrope"}, "rope_parameters.rope_type='longrope'; the nemotron"),
    "two types": ({"type": "linear"}, "rope_parameters.rope_type='yarn'; the nemotron"),
    "a key": ({"short_factor": [1]}, "rope_parameters.short_factor=[1]: the nemotron_diffusion"),
    "rounding": ({"truncate": False}, "rope_parameters.truncate=False: the nemotron_diffusion f"),
    "a text": ({"factor": "16"}, "rope_parameters.factor='16' must be a number from 0 to"),
    "shorter": ({"factor": 0.5}, "rope_parameters.factor as model.rope_factor=0.5 must be at lea"),
    "no factor": ({"factor": ...}, "factor is missing; the nemotron_diffusion family needs it"),
    "no base": ({"rope_theta": ...}, "rope_theta is missing; the nemotron_diffusion family nee"),
    "no length": (
        {"original_max_position_embeddings": ...},
        "original_max_position_embeddings is missing; the nemotron_diffusion family needs it",
    ),
    "betas": ({"beta_slow": 64}, "model.rope_beta_fast=32.0 is less than model.rope_beta_slow=64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_family_does_not_have_is_refused(tmp_path, name):
    changes, said = REFUSED[name]
    with pytest.raises(ValueError, match=".") as error:
        _read(tmp_path, {**PUBLISHED, **changes})
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {said}")


@pytest.mark.parametrize("name", REFUSED_ROPE)
def test_rotary_embeddings_that_it_does_not_have_are_refused(tmp_path, name):
    changes, said = REFUSED_ROPE[name]
    with pytest.raises(ValueError, match=".") as error:
        _rope(tmp_path, changes)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {said}")


PLAIN = {"rope_factor": 1.0, "query_scale_beta": 0.0, "rope_original_length": None}
VARIANTS = {
    "published": {},
    "a factor": {"rope_attention_factor": 1.25},
    "other betas": {"rope_beta_fast": 8.0, "rope_beta_slow": 2.0},
    "no scaled queries": {"query_scale_beta": 0.0},
    "scaled queries alone": {"rope_factor": 1.0},
    "plain": PLAIN,
    "a factor alone": {**PLAIN, "rope_attention_factor": 1.25},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_config_comes_back(tmp_path, name):
    model = replace(_read(tmp_path, TINY), **VARIANTS[name])
    assert FAMILY.settings(FAMILY.config(model)) == model


def test_the_published_keys_come_back(tmp_path):
    config = FAMILY.config(_read(tmp_path, TINY))
    ids = {"bos_token_id": 11}  # Bos is not a setting.
    assert config == {key: {**TINY, **ids}[key] for key in config}


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("nemotron_diffusion", "attention", "block_causal"),
        ("nemotron_diffusion", "qk_norm", True),
        ("llada", "rope_factor", 4.0),
        ("dream", "query_scale_beta", 0.5),
        ("sdar", "rope_attention_factor", 1.5),
    ],
)
def test_a_model_that_the_modelling_code_does_not_compute_has_no_config(
    tmp_path, family, key, value
):
    model = with_values(_read(tmp_path, TINY), FAMILIES[family].fixed)
    said = f"^model.{key}={str(value).lower()}".removesuffix(".0")
    with pytest.raises(ValueError, match=f"{said}: the {family} family's modelling code needs"):
        FAMILIES[family].config(replace(model, **{key: value}))
