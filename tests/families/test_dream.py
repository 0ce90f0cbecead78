"""Dream: config.json both ways, every tensor name, and unsupported features of its code."""

import json
from pathlib import Path

import pytest
import torch

from agrpo_megatron.families import FAMILIES, hf_shapes, settings_from_hf, weight_mappings
from agrpo_megatron.families.transforms import Split, from_megatron, to_megatron

HF = Path(__file__).parent.parent / "fixtures" / "dream_tiny" / "hf"
# Source: config.json of Dream-org/Dream-v0-Instruct-7B.
DREAM_7B = {
    "model_type": "Dream",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "mask_token_id": 151666,
    "eos_token_id": 151643,
    "use_sliding_window": False,
    "rope_scaling": None,
}


def _write(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**DREAM_7B, **changes}))
    return folder


def test_dream_7b_has_its_published_tensors(tmp_path):
    """339 tensors of 15,231,233,024 bytes in bf16."""
    shapes = hf_shapes(settings_from_hf(_write(tmp_path)))
    assert len(shapes) == 339
    assert 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) == 15_231_233_024
    assert shapes["model.layers.27.self_attn.k_proj.bias"] == (512,)
    assert "model.layers.0.self_attn.o_proj.bias" not in shapes


def test_config_comes_back():
    model = settings_from_hf(HF)
    assert model.shift and model.qkv_bias and model.family == "dream"
    config = FAMILIES["dream"].config(model)
    stored = json.loads((HF / "config.json").read_text())
    assert all(config[key] == value for key, value in stored.items() if key in config)
    assert FAMILIES["dream"].settings(config) == model


@pytest.mark.parametrize(
    ("key", "value"),
    [("tie_word_embeddings", True), ("use_sliding_window", True), ("hidden_act", "gelu")],
)
def test_what_the_family_does_not_have_is_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"config.json: {key}="):
        settings_from_hf(_write(tmp_path, **{key: value}))


@pytest.mark.parametrize("size", [1, 2])
def test_biases_are_interleaved_by_query_group_like_their_weights(size):
    model = settings_from_hf(HF)
    name = "decoder.layers.1.self_attention.linear_qkv.bias"
    (line,) = [line for line in weight_mappings(model) if line.megatron == name]
    assert line.transform == "qkv"
    shapes = hf_shapes(model)
    parts = [torch.randn(shapes[name]) for name in line.parts]
    shards = [to_megatron(parts, "qkv", model, Split(rank, size)) for rank in range(size)]
    head, groups = 8, 2
    for group, block in enumerate(torch.cat(shards).view(groups, 5 * head)):
        q, k, v = block[: 3 * head], block[3 * head : 4 * head], block[4 * head :]
        assert torch.equal(q, parts[0][group * 3 * head : (group + 1) * 3 * head])
        assert torch.equal(k, parts[1][group * head : (group + 1) * head])
        assert torch.equal(v, parts[2][group * head : (group + 1) * head])
    assert all(map(torch.equal, from_megatron(shards, "qkv", model), parts))
