"""config.json and what stands next to it: keys, ids and sizes that disagree, one by one."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from agrpo_megatron.config.settings import TokenizerSettings
from agrpo_megatron.families import FAMILIES, settings_from_hf
from agrpo_megatron.families.files import HfWeights
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.text.tokenizer import load_tokenizer
from tests.families.nemotron import TINY
from tests.text.chat_tokenizers import write_llada
from tests.training.tiny import tiny

FIXTURES = Path(__file__).parent.parent / "fixtures"


def _write(folder, family="llada", *, generation=None, **changes):
    """Write a changed config.json of a family, and generation_config.json."""
    folder.mkdir(exist_ok=True)
    source = FIXTURES / f"{family}_tiny" / "hf" / "config.json"
    published = TINY if family == "nemotron_diffusion" else json.loads(source.read_text())
    config = {**published, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _refusal(folder, name="config.json"):
    with pytest.raises(ValueError, match=".") as error:
        settings_from_hf(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / name}: ") and "\n" not in message
    return message.removeprefix(f"{folder / name}: ")


REFUSED = {
    "experts": ("llada", {"num_experts": 64}, "num_experts=64 is no key of the llada family"),
    "a misspelt size": ("llada", {"d_modle": 64}, "d_modle=64 is no key of the llada family"),
    "quantized": ("dream", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    "clipped": ("llada", {"clip_qkv": 8.0}, "clip_qkv=8.0 is no key of the llada family"),
    "a line break": ("llada", {"a\nb": 1}, "a\\nb=1 is no key of the llada family"),
    "a decoder": ("dream", {"is_decoder": True}, "is_decoder=True; the dream family needs False"),
    "dropout": ("llada", {"residual_dropout": 0.1}, "residual_dropout=0.1; the llada family needs"),
    "scaled as transformers 5 writes": (
        "dream",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000000.0}},
        "rope_parameters={'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 1000000.0}; ",
    ),
    "two bases": (
        "dream",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0}; the dream family needs",
    ),
    "two depths": ("llada", {"num_hidden_layers": 3}, "num_hidden_layers=3; the llada family need"),
    "two head sizes": ("dream", {"head_dim": 16}, "head_dim=16; the dream family needs 8 here"),
    "a base that is no number": (
        "nemotron_diffusion",
        {"rope_parameters": {**TINY["rope_parameters"], "rope_theta": 0.5}},
        "rope_parameters.rope_theta as model.rope_theta=0.5 must be at least 1",
    ),
    "a mask outside of Nemotron's rows": (
        "nemotron_diffusion",
        {"mask_token_id": 160},
        "mask_token_id=160 does not fit",
    ),
    "a head of odd width": ("sdar", {"head_dim": 5}, "model.head_dim=5 is odd"),
    "heads that do not divide": ("llada", {"n_heads": 5}, "model.num_attention_heads=5 does not"),
    "no width": ("llada", {"mlp_hidden_size": 0}, "mlp_hidden_size as model.ffn_hidden_size=0 mus"),
    "no groups": ("llada", {"n_kv_heads": 0}, "n_kv_heads as model.num_query_groups=0 must be"),
    "no rows": ("llada", {"embedding_size": 0}, "embedding_size as model.vocab_size=0 must be"),
    "a ratio that is none": (
        "llada",
        {"mlp_hidden_size": None, "mlp_ratio": "4"},
        "mlp_ratio as model.ffn_hidden_size='4' has the wrong type; it must be an integer",
    ),
    "an endless base": ("dream", {"rope_theta": 10**400}, "rope_theta as model.rope_theta="),
    "more used rows than rows": ("llada", {"vocab_size": 161}, "vocab_size=161 does not fit"),
    "a mask outside": ("llada", {"mask_token_id": 160}, "mask_token_id=160 does not fit"),
    "an end outside": ("dream", {"eos_token_id": 384}, "eos_token_id=384 does not fit"),
    "a later end outside": (
        "llada",
        {"eos_token_id": [158, 999]},
        "eos_token_id=999 does not fit",
    ),
    "an end that is null": (
        "llada",
        {"eos_token_id": [158, None]},
        "eos_token_id=None does not fit",
    ),
    "no ends": ("llada", {"eos_token_id": []}, "eos_token_id is missing; the llada family needs"),
    "a mask that ends": (
        "llada",
        {"eos_token_id": [158, 159]},
        "mask_token_id=159 is eos_",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_is_unknown_or_contradicts_another_is_refused(tmp_path, name):
    family, changes, said = REFUSED[name]
    assert _refusal(_write(tmp_path, family, **changes)).startswith(said)


TAKEN = {
    "written by transformers 5": (
        "dream",
        {
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "id2label": {"0": "LABEL_0"},
            "is_encoder_decoder": False,
            "chunk_size_feed_forward": 0,
        },
    ),
    "a second name of a size": ("llada", {"hidden_size": 32, "num_hidden_layers": 2}),
    "a window that is not used": ("sdar", {"sliding_window": 4096}),
    "the published block": ("sdar", {"block_size": None}),
    "nulls": ("dream", {"quantization_config": None, "layer_types": None}),
    "of a fine-tune": ("llada", {"auto_map": {}, "unsloth_version": "1", "torch_dtype": "float32"}),
    "a padding of its own": ("dream", {"pad_token_id": 381, "bos_token_id": 379}),
    "several ends": ("llada", {"eos_token_id": [158, 157]}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_changes_no_logits_is_taken(tmp_path, name):
    family, changes = TAKEN[name]
    unchanged = settings_from_hf(FIXTURES / f"{family}_tiny" / "hf")
    assert settings_from_hf(_write(tmp_path, family, **changes)) == unchanged


def test_an_exported_config_has_no_dropout():
    """The modelling code's own default is 0.1."""
    config = FAMILIES["llada"].config(settings_from_hf(FIXTURES / "llada_tiny" / "hf"))
    parts = ("attention", "embedding", "residual")
    assert [config[f"{part}_dropout"] for part in parts] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model_type": "llada", "n_layers": 2, "n_layers": 3}', "'n_layers' is written twice"),
        ("[" * 100_000, "not a JSON object"),
        ('"llada"', "it holds a str"),
        ("", "Expecting value"),
        (b"\xff{}", "codec can't decode"),
    ],
)
def test_a_config_that_is_no_object_is_refused(tmp_path, content, said):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(content)
    assert said in _refusal(tmp_path)


GENERATION = {
    "another mask": ({"mask_token_id": 5}, "mask_token_id=5 is 159 in config.json; correct one"),
    "an end outside": ({"eos_token_id": 160}, "eos_token_id=160 does not fit"),
    "one of several outside": ({"eos_token_id": [158, -1]}, "eos_token_id=-1 does not fit"),
    "the mask as an end": ({"eos_token_id": [159]}, "mask_token_id=159 is eos_token_id too"),
    "a text": ({"eos_token_id": "158"}, "eos_token_id='158' does not fit"),
    "a list": ([], "not a JSON object (it holds a list)"),
}


@pytest.mark.parametrize("name", GENERATION)
def test_a_generation_config_that_disagrees_is_refused(tmp_path, name):
    generation, said = GENERATION[name]
    folder = _write(tmp_path, generation=generation)
    assert _refusal(folder, "generation_config.json").startswith(said)


def test_a_generation_config_may_name_more_ends(tmp_path):
    generation = {"eos_token_id": [158, 157], "pad_token_id": 3, "temperature": 0.7}
    folder = _write(tmp_path, generation=generation)
    assert settings_from_hf(folder).eos_token_id == 158


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ({"eos_token_id": 257}, None, set()),
        ({"eos_token_id": [257, 70]}, None, {70}),
        ({"eos_token_id": 257}, {"eos_token_id": 71}, {71}),
        ({"eos_token_id": [70]}, {"eos_token_id": [71, 257]}, {70, 71}),
        ({"eos_token_id": None}, {}, set()),
        ({"eos_token_id": [True, "70"]}, {"eos_token_id": 1.5}, set()),
    ],
)
def test_every_end_of_text_of_the_folder_ends_a_completion(tmp_path, config, generation, stops):
    folder = write_llada(tmp_path / "tokenizer")
    plain = load_tokenizer(TokenizerSettings(str(folder)))
    for name, content in (("config", config), ("generation_config", generation)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(TokenizerSettings(str(folder)))
    assert tokenizer.eos_id == 257 and tokenizer.stop_ids == plain.stop_ids | stops
    for stop in stops:
        text = tokenizer.encode("ab")
        assert tokenizer.decode([*text, stop, *text]) == "ab"


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        ([], []),
        (["model.eos_token_id=5"], ["model.eos_token_id=5 is used; the tokenizer's own is 1"]),
        (["model.mask_token_id=6"], ["model.mask_token_id=6 is used; the tokenizer's own is 2"]),
    ],
)
def test_ids_that_the_tokenizer_gives_otherwise_are_noted(overrides, notes):
    assert resolve(tiny(*overrides), world_size=1).task.notes == notes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 3}, "tensor model.transformer.blocks.2.attn_norm.weight is missing"),
        ({"n_layers": 1}, "blocks.1.attn_norm.weight and 8 more would be lost"),
        ({"mlp_hidden_size": 64}, "has shape [96, 32], and config.json asks for [64, 32]"),
        ({"embedding_size": 192}, "has shape [160, 32], and config.json asks for [192, 32]"),
        ({"n_kv_heads": 2}, "has shape [32, 32], and config.json asks for [16, 32]"),
        ({"include_qkv_bias": True}, "q_proj.bias is missing"),
    ],
)
def test_weights_of_other_sizes_are_refused_with_the_settings(tmp_path, changes, said):
    """Before any rank starts."""
    _write(tmp_path, **changes)
    shutil.copy(FIXTURES / "llada_tiny" / "hf" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=".") as error:
        resolve(tiny(f"model.load={tmp_path}"), world_size=1)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_weights_of_whole_numbers_are_refused(tmp_path):
    tensors = load_file(FIXTURES / "llada_tiny" / "hf" / "model.safetensors")
    name = "model.transformer.blocks.1.ff_out.weight"
    save_file({**tensors, name: tensors[name].byte()}, _write(tmp_path) / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} has dtype torch.uint8; quantized weights are n"):
        HfWeights(tmp_path, settings_from_hf(tmp_path))
