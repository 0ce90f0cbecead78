"""SDAR: the published config.json of each size, their tensors, and unsupported features."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import FAMILIES, hf_shapes, settings_from_hf, weight_mappings
from agrpo_megatron.families.transforms import Split, from_megatron, to_megatron

HF = Path(__file__).parent.parent / "fixtures" / "sdar_tiny" / "hf"
# Source: config.json of SDAR-1.7B, 4B and 8B-Chat in JetAstra/SDAR.
PUBLISHED = {
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "bos_token_id": 151643,
    "debug": False,
    "eos_token_id": 151643,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "micro_forward": False,
    "model_type": "sdar",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_deepep": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SIZES = {
    "1.7B": {"hidden": 2048, "ffn": 6144, "layers": 28, "heads": 16},
    "4B": {"hidden": 2560, "ffn": 9728, "layers": 36, "heads": 32},
    "8B": {"hidden": 4096, "ffn": 12288, "layers": 36, "heads": 32},
}
IN_THE_FILE = {"block_size": 4, "mask_token_id": 151669}  # of the copies changed for training


def _config(size, **changes):
    given = SIZES[size]
    sizes = {"hidden_size": given["hidden"], "intermediate_size": given["ffn"]}
    sizes |= {"num_hidden_layers": given["layers"], "max_window_layers": given["layers"]}
    sizes |= {"num_attention_heads": given["heads"]}
    return {**PUBLISHED, **sizes, **changes}


def _write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("more", [{}, IN_THE_FILE, dict.fromkeys(IN_THE_FILE)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_published_config_becomes_settings(tmp_path, size, more):
    """The hub's files lack `block_size` and `mask_token_id`, which published engines know."""
    given = SIZES[size]
    assert settings_from_hf(_write(tmp_path, _config(size, **more))) == ModelSettings(
        family="sdar",
        num_layers=given["layers"],
        hidden_size=given["hidden"],
        ffn_hidden_size=given["ffn"],
        num_attention_heads=given["heads"],
        num_query_groups=8,
        head_dim=128,
        vocab_size=151936,
        mask_token_id=151669,
        eos_token_id=151643,
        max_sequence_length=32768,
        rope_theta=1000000.0,
        norm_epsilon=1e-6,
        qk_norm=True,
        attention="block_causal",
        block_length=4,
    )


def test_other_blocks_and_masks_are_read(tmp_path):
    model = settings_from_hf(_write(tmp_path, _config("4B", block_size=32, mask_token_id=151670)))
    assert (model.block_length, model.mask_token_id) == (32, 151670)


@pytest.mark.parametrize(("size", "count"), [("1.7B", 311), ("4B", 399), ("8B", 399)])
def test_each_size_has_its_published_number_of_tensors(tmp_path, size, count):
    assert len(hf_shapes(settings_from_hf(_write(tmp_path, _config(size))))) == count


@pytest.mark.parametrize(("size", "nbytes"), [("4B", 8_822_848_512), ("8B", 16_381_470_720)])
def test_the_tensors_have_the_published_bytes(tmp_path, size, nbytes):
    """Source: total_size of model.safetensors.index.json, in bf16."""
    shapes = hf_shapes(settings_from_hf(_write(tmp_path, _config(size))))
    assert 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) == nbytes
    hidden = SIZES[size]["hidden"]
    attention = "model.layers.35.self_attn."
    found = {name: shapes[attention + name] for name in ("q_proj.weight", "o_proj.weight")}
    assert found == {"q_proj.weight": (4096, hidden), "o_proj.weight": (hidden, 4096)}
    assert shapes[attention + "k_proj.weight"] == (1024, hidden)
    assert shapes[attention + "q_norm.weight"] == shapes[attention + "k_norm.weight"] == (128,)


def test_every_tensor_of_the_checkpoint_is_named_once_with_its_shape():
    with safe_open(HF / "model.safetensors", framework="numpy") as stored:
        there = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    assert hf_shapes(settings_from_hf(HF)) == there


@pytest.mark.parametrize("size", [1, 2])
def test_wide_heads_are_split_and_joined_bit_for_bit(size):
    """Four heads of 32 in a stream of 64: queries are wider than the stream."""
    model, copies = settings_from_hf(HF), 0
    shapes = hf_shapes(model)
    for line in weight_mappings(model):
        parts = [torch.randn(shapes[name]) for name in line.parts]
        shards = [to_megatron(parts, line.transform, model, Split(r, size)) for r in range(size)]
        assert all(map(torch.equal, from_megatron(shards, line.transform, model), parts))
        copies += line.transform == "copy"
    assert copies == 4 * model.num_layers + 1  # norms


REFUSED = {
    "tie_word_embeddings": (True, "tie_word_embeddings=True; the sdar family needs False here"),
    "attention_bias": (True, "attention_bias=True; the sdar family needs False here"),
    "attention_dropout": (0.1, "attention_dropout=0.1; the sdar family needs 0.0 here"),
    "use_sliding_window": (True, "use_sliding_window=True; the sdar family needs False here"),
    "hidden_act": ("gelu", "hidden_act='gelu'; the sdar family needs silu here"),
    "rope_scaling": ({"type": "yarn"}, "rope_scaling={'type': 'yarn'}; the sdar family needs None"),
    "num_experts": (128, "num_experts=128 is no key of the sdar family"),
    "head_dim": (None, "head_dim is missing; the sdar family needs it"),
    "block_size": (0, "block_size as model.block_length=0 must be at least 1"),
    "mask_token_id": (151936, "mask_token_id=151936 does not fit the embedding of 151936 rows"),
    "eos_token_id": (151669, "mask_token_id=151669 is eos_token_id too"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_family_does_not_have_is_refused(tmp_path, key):
    value, said = REFUSED[key]
    with pytest.raises(ValueError, match=".") as error:
        settings_from_hf(_write(tmp_path, _config("4B", **{key: value})))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {said}")


def test_config_comes_back():
    model = settings_from_hf(HF)
    config = FAMILIES["sdar"].config(model)
    stored = json.loads((HF / "config.json").read_text())
    assert {key: stored[key] for key in config} == config
    assert FAMILIES["sdar"].settings(config) == model
    assert {"head_dim", "block_size", "mask_token_id"} <= config.keys()


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("sdar", {"qk_norm": False}, "model.qk_norm=false: the sdar family's modelling code needs"),
        ("sdar", {"attention": "full", "block_length": None}, "model.attention=full: the sdar fam"),
        ("sdar", {"shift": True}, "model.shift=true: the sdar family's modelling code needs false"),
        ("llada", {"attention": "block_causal"}, "model.attention=block_causal: the llada family"),
        (
            "llada",
            {"head_dim": 48},
            "model.head_dim=48: the llada family's modelling code needs",
        ),
        (
            "dream",
            {"shift": False},
            "model.shift=false: the dream family's modelling code needs",
        ),
    ],
)
def test_a_model_that_the_modelling_code_does_not_compute_has_no_config(family, changes, said):
    model = settings_from_hf(HF.parent.parent / f"{family}_tiny" / "hf")
    with pytest.raises(ValueError, match=f"^{said}"):
        FAMILIES[family].config(replace(model, **changes))
