"""Families with experts: their configurations both ways, their tensors, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from agrpo_megatron.families import FAMILIES, hf_shapes, settings_from_hf
from agrpo_megatron.families.files import HfWeights

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDERS = {"sdarmoe_tiny": "sdar_moe", "lladamoe_tiny": "llada_moe", "llada2_tiny": "llada2_moe"}


def _config(name):
    return json.loads((FIXTURES / name / "hf" / "config.json").read_text())


def _read(folder, config, **lacking):
    (folder / "config.json").write_text(json.dumps(config))
    return settings_from_hf(folder, lacking)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_tensors_are_those_of_the_file(name):
    hf = FIXTURES / name / "hf"
    with safe_open(hf / "model.safetensors", framework="numpy") as stored:
        there = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    assert hf_shapes(settings_from_hf(hf)) == there


@pytest.mark.parametrize("name", FOLDERS)
def test_a_configuration_comes_back(tmp_path, name):
    model = _read(tmp_path, _config(name), mask_token_id=379)
    assert model.family == FOLDERS[name] and model.mask_token_id == 379
    written = FAMILIES[model.family].config(model)
    assert _read(tmp_path, written) == model
    read_by_it = {key: value for key, value in _config(name).items() if key in written}
    same = {key: written[key] for key in read_by_it}
    # How the modelling code runs, and numbers of another type.
    free = ("architectures", "use_cache", "routed_scaling_factor", "block_size")
    assert {k: v for k, v in same.items() if k not in free} == {
        k: v for k, v in read_by_it.items() if k not in free
    }


def test_a_mask_token_is_the_published_one_or_the_tokenizers(tmp_path):
    config = _config("llada2_tiny")
    assert _read(tmp_path, config).mask_token_id is None
    assert _read(tmp_path, {**config, "vocab_size": 157184}).mask_token_id == 156895


def test_first_dense_layers_and_shared_experts_of_llada_moe(tmp_path):
    config = {
        **_config("lladamoe_tiny"),
        "moe_layer_freq": [0, 1, 1],
        "shared_expert_intermediate_size": 48,
        "partial_rotary_factor": 0.5,
    }
    model = _read(tmp_path, config)
    assert model.moe.dense_layers == 1 and model.rotary_width == 8
    shapes = hf_shapes(model)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (160, 64)
    assert shapes["model.layers.2.shared_expert.down_proj.weight"] == (64, 48)
    assert "model.layers.0.mlp.gate.weight" not in shapes


def test_one_group_and_no_shared_experts_restrict_and_add_nothing(tmp_path):
    config = {**_config("llada2_tiny"), "n_group": 1, "topk_group": 1, "num_shared_experts": 0}
    moe = _read(tmp_path, config).moe
    assert (moe.groups, moe.group_topk, moe.shared_ffn_hidden_size) == (None, None, None)


REFUSED = {
    "a dense layer in between": ("lladamoe_tiny", {"moe_layer_freq": [1, 0, 1]}, "moe_layer_freq="),
    "a bias that weighs": (
        "lladamoe_tiny",
        {"moe_router_enable_expert_bias": True},
        "moe_router_enable_expert_bias=True; the llada_moe family needs False here",
    ),
    "every second layer": (
        "sdarmoe_tiny",
        {"decoder_sparse_step": 2},
        "decoder_sparse_step=2; the sdar_moe family needs 1 here",
    ),
    "another score": (
        "llada2_tiny",
        {"score_function": "softmax"},
        "score_function='softmax'; the llada2_moe family needs sigmoid here",
    ),
    "another rotated part": ("llada2_tiny", {"rotary_dim": 4}, "rotary_dim=4; the llada2_moe"),
    "layers that predict ahead": (
        "llada2_tiny",
        {"num_nextn_predict_layers": 1},
        "num_nextn_predict_layers=1; the llada2_moe",
    ),
    "more experts of a token than experts": (
        "sdarmoe_tiny",
        {"num_experts_per_tok": 9},
        "model.moe.topk=9 is more than model.moe.experts=8",
    ),
    "no experts": ("llada2_tiny", {"num_experts": 0}, "num_experts as model.moe.experts=0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_another_model_is_refused(tmp_path, what):
    name, change, said = REFUSED[what]
    with pytest.raises(ValueError, match=".") as error:
        _read(tmp_path, {**_config(name), **change})
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {said}")
    assert "\n" not in str(error.value)


def test_more_experts_than_tensors_are_refused_at_once(tmp_path):
    hf = FIXTURES / "sdarmoe_tiny" / "hf"
    model = _read(tmp_path, {**_config("sdarmoe_tiny"), "num_experts": 10**9})
    with pytest.raises(ValueError, match="asks for 1000000000 experts of a layer"):
        HfWeights(hf, model)


def test_shared_experts_have_the_width_of_some_experts(tmp_path):
    model = _read(tmp_path, _config("llada2_tiny"), mask_token_id=379)
    other = replace(model, moe=replace(model.moe, shared_ffn_hidden_size=48))
    with pytest.raises(ValueError, match="needs a multiple of model.moe.ffn_hidden_size=32"):
        FAMILIES["llada2_moe"].config(other)
