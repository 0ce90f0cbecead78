"""Whatever config.json says: the model has those settings, or one line names file and key.

AGRPO_EXAMPLES sets the number of generated files.
"""

import json
import os
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agrpo_megatron.families import settings_from_hf
from tests.families.nemotron import TINY

FIXTURES = Path(__file__).parent.parent / "fixtures"
EXAMPLES = int(os.environ.get("AGRPO_EXAMPLES", "420"))
FILES = {"llada": "llada", "dream": "dream", "sdar": "sdar"}
FILES |= {"sdar_moe": "sdarmoe", "llada_moe": "lladamoe", "llada2_moe": "llada2"}
CONFIGS = {
    family: json.loads((FIXTURES / f"{name}_tiny" / "hf" / "config.json").read_text())
    for family, name in FILES.items()
}
CONFIGS["nemotron_diffusion"] = TINY
# Keys of each file that may change: sizes and ids, and what changes no logits.
SIZES = {
    "llada": {
        "num_layers": "n_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "max_sequence_length": "max_sequence_length",
        "rope_theta": "rope_theta",
        "norm_epsilon": "rms_norm_eps",
        "mask_token_id": "mask_token_id",
    },
    "dream": {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "rope_theta": "rope_theta",
        "norm_epsilon": "rms_norm_eps",
        "mask_token_id": "mask_token_id",
    },
}
SIZES["sdar"] = {**SIZES["dream"], "head_dim": "head_dim", "block_length": "block_size"}
SIZES["nemotron_diffusion"] = {k: v for k, v in SIZES["sdar"].items() if k != "rope_theta"}
EXPERTS = {
    "moe.experts": "num_experts",
    "moe.topk": "num_experts_per_tok",
    "moe.ffn_hidden_size": "moe_intermediate_size",
}
SIZES["sdar_moe"] = SIZES["sdar"] | EXPERTS | {"moe.normalise": "norm_topk_prob"}
SIZES["llada_moe"] = (
    SIZES["dream"]
    | EXPERTS
    | {
        "ffn_hidden_size": "dense_intermediate_size",
        "moe.ffn_hidden_size": "expert_intermediate_size",
        "moe.shared_ffn_hidden_size": "shared_expert_intermediate_size",
        "qk_norm": "qk_layernorm",
        "rotary_fraction": "partial_rotary_factor",
    }
)
SIZES["llada2_moe"] = SIZES["sdar_moe"] | {
    "moe.dense_layers": "first_k_dense_replace",
    "moe.scaling_factor": "routed_scaling_factor",
    "moe.expert_bias": "moe_router_enable_expert_bias",
    "qk_norm": "use_qk_norm",
    "rotary_fraction": "partial_rotary_factor",
}
ROPE = {
    "rope_theta": "rope_theta",
    "rope_factor": "factor",
    "rope_original_length": "original_max_position_embeddings",
    "query_scale_beta": "llama_4_scaling_beta",
}
# Of families whose published files lack them: the mask token, which needs a row, and the block.
MASKS = {"sdar": 151669, "sdar_moe": 151669, "llada_moe": 156895, "llada2_moe": 156895}
BLOCKS = {"sdar": 4, "nemotron_diffusion": None, "sdar_moe": 4, "llada2_moe": 32}
OTHER_SIZES = {
    *("embedding_size", "eos_token_id", "include_qkv_bias", "mlp_hidden_size", "mlp_ratio"),
    *("model_type", "n_kv_heads", "vocab_size"),
}
FREE = {
    *("alibi_bias_max", "architectures", "attention_layer_norm_with_affine", "auto_map"),
    *("bos_token_id", "dtype", "flash_attention", "init_cutoff_factor", "init_device", "init_fn"),
    *("init_std", "initializer_range", "max_window_layers", "pad_token_id", "precision"),
    *("sliding_window", "torch_dtype", "train_max_sequence_length", "transformers_version"),
    *("attn_implementation", "debug", "ep_size", "fuse_cross_entropy", "micro_forward"),
    *("skip_checkpoint", "use_cache", "use_deepep"),
    *("moe_layer_freq", "moe_router_score_function", "mtp_loss_scaling_factor", "n_group"),
    *("norm_topk_prob", "num_nextn_predict_layers", "num_shared_experts", "output_router_logits"),
    *("rotary_dim", "routed_scaling_factor", "router_aux_loss_coef", "router_dtype"),
    *("router_num_group", "router_topk_group", "shared_expert_intermediate_size", "topk_group"),
    *("ar_loss_weight", "dlm_loss_weight", "dlm_paradigm", "dp_varying_mask_ratio", "rope_theta"),
}
MORE = (
    *("auto_map", "block_size", "head_dim", "hidden_size", "is_decoder", "max_position_embeddings"),
    *("num_hidden_layers", "num_key_value_heads", "rope_parameters", "torch_dtype"),
    *("clip_qkv", "d_modle", "num_experts", "quantization_config", "rope_scaling", "a\nb"),
)
LEAVES = (
    st.sampled_from([0, 1, 2, -1, 4, 8, 10**5, 10**9, 10**30, 10**400, 0.5, 32.0, 1e308, 1e-400])
    | st.sampled_from(["", "silu", "4", "nan", "dream", "true", [], {}, None, True, False])
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)


@st.composite
def files(draw):
    """Return a family's name and the text of a changed config.json, a key perhaps twice."""
    name = draw(st.sampled_from(list(CONFIGS)))
    pairs = list(CONFIGS[name].items())
    for _ in range(draw(st.integers(0, 3))):
        known = st.sampled_from([*CONFIGS[name], *MORE]) | st.text(max_size=5)
        key, other = draw(known), draw(st.sampled_from(pairs))[1]
        value = draw(VALUES | st.just(other))
        how = draw(st.sampled_from(["set", "set", "remove", "twice", "nest"]))
        if how != "twice":
            pairs = [pair for pair in pairs if pair[0] != key] or pairs
        if how != "remove":
            pairs.append((key, {key: value} if how == "nest" else value))
    text = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs)
    return name, draw(st.sampled_from([f"{{{text}}}"] * 20 + [f"{{{text}", f"[{{{text}}}]"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


@example(("llada", "[" * 100_000))
@example(("llada", '{"model_type": "llada", "rope_theta": NaN}'))
@given(files())
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
def test_a_config_is_taken_as_written_or_refused_in_one_line(folder, written):
    _, text = written
    path = folder / "config.json"
    path.write_text(text)
    try:
        model = settings_from_hf(folder)
    except ValueError as error:
        _check_refusal(str(error), path, text)
        return
    _check_settings(model, json.loads(text, object_pairs_hook=_pairs))


def _pairs(pairs):
    assert len(dict(pairs)) == len(pairs), "a file with a key twice was taken"
    return dict(pairs)


def _check_refusal(message, path, text):
    assert "\n" not in message and message.startswith(str(path))
    said = message.removeprefix(str(path))
    if "not a JSON object" not in said:
        assert said.startswith(": ") and ("=" in said or "is missing" in said)
        config = json.loads(text)
        names = [ascii(key)[1:-1] for key in config] + [*OTHER_SIZES, *ROPE.values()]
        names += [key for sizes in SIZES.values() for key in (*sizes, *sizes.values())]
        names += [*(key for published in CONFIGS.values() for key in published), "rope_parameters"]
        assert any(name in said for name in names)


def _check_settings(model, config):
    """Compare with what the modelling codes read, spelled out again."""
    given = {key: value for key, value in config.items() if value is not None}
    eos = given.get("eos_token_id", given.get("pad_token_id"))  # LLaDA2's files lack the first
    mask, block = MASKS.get(model.family), BLOCKS.get(model.family)
    lacking = {"block_size": block} if block else {}
    if mask and given["vocab_size"] > mask:
        lacking["mask_token_id"] = mask
    given = {**lacking, **given}
    expected = {ours: given.get(theirs) for ours, theirs in SIZES[model.family].items()}
    expected["eos_token_id"] = eos[0] if isinstance(eos, list) else eos
    if model.family == "llada":
        ffn = given.get("mlp_hidden_size")
        expected["ffn_hidden_size"] = given["mlp_ratio"] * given["d_model"] if ffn is None else ffn
        expected["num_query_groups"] = given.get("n_kv_heads", given["n_heads"])
        expected["vocab_size"] = given.get("embedding_size", given.get("vocab_size"))
        expected["qkv_bias"] = given.get("include_qkv_bias", False)
    if model.family == "nemotron_diffusion":
        rope = given.get("rope_parameters", given.get("rope_scaling"))
        if rope.get("rope_type", rope.get("type")) == "yarn" and rope["factor"] != 1:
            assert {getattr(model, ours) == rope[theirs] for ours, theirs in ROPE.items()} == {True}
    for name in expected.keys() & {
        "rope_theta",
        "norm_epsilon",
        "rotary_fraction",
        "moe.scaling_factor",
    }:  # a number may be written as text, as in settings
        expected[name] = float(expected[name])
    found = {name: attrgetter(name)(model) for name in expected}
    assert found == expected and list(map(type, found.values())) == [
        type(value) for value in expected.values()
    ]
    assert model.shift == (model.family == "dream") == (str(given["model_type"]).lower() == "dream")
    if "qk_norm" not in expected:
        assert model.qk_norm == (model.family in ("sdar", "sdar_moe"))
    assert model.has_blocks == (model.family in BLOCKS)
    assert (model.moe.experts is None) == ("moe.experts" not in expected)
    free = {*SIZES[model.family].values(), *OTHER_SIZES, *FREE, *MORE}
    for key in given.keys() - free:
        published = CONFIGS[model.family][key]
        assert given[key] == (False if published is None else published), key
