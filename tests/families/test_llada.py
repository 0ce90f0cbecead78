"""LLaDA: config.json to settings, its errors, and the name of every tensor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import FAMILIES, hf_shapes, settings_from_hf
from agrpo_megatron.families.tensors import expand

HF = Path(__file__).parent.parent / "fixtures" / "llada_tiny" / "hf"
CONFIG = json.loads((HF / "config.json").read_text(encoding="utf-8"))


def _write(folder, **changes):
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _refusal(folder):
    with pytest.raises(ValueError, match=".") as error:
        settings_from_hf(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_config_json_becomes_settings():
    assert settings_from_hf(HF) == ModelSettings(
        family="llada",
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=4,
        vocab_size=160,
        mask_token_id=159,
        eos_token_id=158,
        max_sequence_length=4096,
        rope_theta=500000.0,
        norm_epsilon=1e-5,
    )


def test_config_json_of_the_released_8b_model_becomes_settings(tmp_path):
    """Values of LLaDA-8B: padded embedding, mlp_hidden_size unlike mlp_ratio * d_model."""
    large = {
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_ratio": 4,
        "mlp_hidden_size": 12288,
        "vocab_size": 126464,
        "embedding_size": 126464,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "max_sequence_length": 4096,
    }
    model = settings_from_hf(_write(tmp_path, **large))
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (32, 4096, 12288)
    assert (model.vocab_size, model.mask_token_id, model.eos_token_id) == (126464, 126336, 126081)


def test_the_embedding_counts_rows_and_the_ratio_stands_in_for_the_size(tmp_path):
    changes = {"vocab_size": 150, "mlp_hidden_size": None, "mlp_ratio": 3, "n_kv_heads": 2}
    model = settings_from_hf(_write(tmp_path, **changes))
    assert (model.vocab_size, model.ffn_hidden_size, model.num_query_groups) == (160, 96, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True),
        ("rope", False),
        ("block_type", "sequential"),
        ("layer_norm_type", "default"),
        ("activation_type", "swiglu"),
        ("include_bias", True),
        ("weight_tying", True),
        ("scale_logits", True),
        ("input_emb_norm", True),
        ("attention_layer_norm", True),
        ("bias_for_layer_norm", True),
        ("layer_norm_with_affine", False),
        ("rope_full_precision", False),
        ("multi_query_attention", True),
        ("residual_dropout", 0.1),
        ("block_group_size", 2),
    ],
)
def test_what_this_model_does_not_do_is_refused_by_its_key(tmp_path, key, value):
    message = _refusal(_write(tmp_path, **{key: value}))
    said = f"{tmp_path / 'config.json'}: {key}={value!r}; the llada family needs "
    assert message.startswith(said)


@pytest.mark.parametrize(
    "key",
    [
        "d_model",
        "n_layers",
        "n_heads",
        "mask_token_id",
        "eos_token_id",
        "max_sequence_length",
        "rope_theta",
        "rms_norm_eps",
    ],
)
def test_a_missing_key_is_named(tmp_path, key):
    message = _refusal(_write(tmp_path, **{key: "absent"}))
    said = f"{tmp_path / 'config.json'}: {key} is missing; the llada family needs it"
    assert message == said


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [("n_layers", "two", "num_layers"), ("d_model", 0, "hidden_size"), ("rope_theta", "b", "")],
)
def test_a_value_of_the_wrong_kind_is_named_as_the_setting_it_becomes(tmp_path, key, value, ours):
    message = _refusal(_write(tmp_path, **{key: value}))
    said = f"{tmp_path / 'config.json'}: {key} as model.{ours or key}={value!r}"
    assert message.startswith(said)


def test_another_family_is_refused_with_those_that_are_known(tmp_path):
    message = _refusal(_write(tmp_path, model_type="gpt2"))
    assert message.endswith(
        "config.json: model_type='gpt2'; known families are llada, dream, sdar, "
        "nemotron_labs_diffusion, sdar_moe, llada_moe, llada2_moe, llama, qwen2, qwen3, "
        "llada2_moe_veomni"
    )


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_an_unreadable_config_json_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    message = _refusal(tmp_path)
    assert str(tmp_path / "config.json") in message
    assert "give a Hugging Face directory" in message


def test_every_tensor_of_the_checkpoint_is_named_once_with_its_shape():
    model = settings_from_hf(HF)
    with safe_open(HF / "model.safetensors", framework="numpy") as stored:
        there = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    assert hf_shapes(model) == there


@pytest.mark.parametrize(("layers", "bias", "norm"), [(2, False, False), (3, True, True)])
def test_a_layer_has_nine_tensors_and_the_model_three(layers, bias, norm):
    """Biases add one per query, key and value; qk-norm one each for queries and keys."""
    model = ModelSettings(num_layers=layers, vocab_size=160, qkv_bias=bias, qk_norm=norm)
    assert len(hf_shapes(model)) == (9 + 3 * bias + 2 * norm) * layers + 3
    lines = expand(FAMILIES["llada"].mappings(model), replace(model, num_layers=layers))
    names = [name for line in lines for name in line.parts]
    assert len(names) == len(set(names)) == len(hf_shapes(model))
    assert len({line.megatron for line in lines}) == len(lines)
