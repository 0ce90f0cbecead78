"""Llama, Qwen2.5 and Qwen3: config.json and weights both ways, causal logits, tied embeddings."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from agrpo_megatron.checkpoint.convert import to_hf_directory, to_megatron_checkpoint
from agrpo_megatron.checkpoint.exports.modeling_agrpo import AgrpoConfig, AgrpoModel
from agrpo_megatron.checkpoint.exports.own_files import own_config
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.packing import pack
from agrpo_megatron.diffusion.patterns import block_causal
from agrpo_megatron.families import FAMILIES, hf_shapes, settings_from_hf
from agrpo_megatron.families.files import HfWeights
from agrpo_megatron.families.starts.weights import started_part
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.megatron.weights import load_hf
from tests.families.autoregressive import LLAMA3, make_autoregressive, write_autoregressive
from tests.ranks import run_ranks

CASES = {
    "llama": {"family": "llama", "tied": False},
    "llama31": {"family": "llama", "tied": True, "rope_parameters": LLAMA3},
    "llama with wide heads": {"family": "llama", "tied": False, "head_dim": 16},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "tied": True},
    "qwen3 with a head": {"family": "qwen3", "tied": False},
}
LENGTH = 48  # rows are longer than Llama 3.1's original length


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write a folder of each case; return them with the models of transformers."""
    found = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("models") / name.replace(" ", "_")
        found[name] = folder, write_autoregressive(folder, **case)
    return found


def _quiet(_done, _total):
    pass


def _ids():
    return torch.randint(0, 83, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def causal_logits(folders):
    """Return the causal logits of the engine for each folder, on the last stage."""
    found, ranks = [], None
    for folder in folders:
        model = replace(settings_from_hf(folder), mask_token_id=0)
        settings = Settings(model=model)
        ranks = ranks or start_ranks(settings)
        network = build_network(settings, ranks)
        load_hf(network, model, folder)
        scored = torch.ones(2, LENGTH, dtype=torch.bool)
        patterns = [block_causal(LENGTH, 1)] * 2
        rows = pack(_ids(), torch.tensor([LENGTH] * 2), scored, patterns=patterns)
        found.append(forward_rows(network, [rows], lambda _, logits: logits)[0])
    return found


def test_causal_logits_are_those_of_transformers(folders):
    ours = run_ranks(1, causal_logits, [folder for folder, _ in folders.values()])[0]
    for (name, (_, model)), logits in zip(folders.items(), ours, strict=True):
        with torch.no_grad():
            theirs = model(_ids()).logits.flatten(0, 1)
        assert (theirs - logits).abs().max() < 1e-5 * theirs.abs().max(), name


@pytest.mark.parametrize("name", CASES)
def test_settings_and_tensors_are_those_of_the_folder(folders, name):
    folder, model = folders[name]
    found = settings_from_hf(folder)
    assert (found.attention, found.shift, found.block_length) == ("causal", True, None)
    assert found.tie_embeddings == CASES[name]["tied"] and found.mask_token_id is None
    stored = load_file(folder / "model.safetensors")
    assert hf_shapes(found) == {key: tuple(tensor.shape) for key, tensor in stored.items()}
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters()
    assert FAMILIES[found.family].settings(FAMILIES[found.family].config(found)) == found


@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_keeps_every_file(folders, name, tmp_path):
    folder, _ = folders[name]
    to_megatron_checkpoint(folder, tmp_path / "m", progress=_quiet)
    to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            ours, theirs = load_file(tmp_path / "h" / file.name), load_file(file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        else:
            assert (tmp_path / "h" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types=.*full_attention in all layers"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn'; the qwen3"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 2}}, "rope_parameters.factor=2 is no"),
        ({"rope_parameters": {}, "rope_theta": None}, "rope_theta is missing"),
        ({"rope_theta": 5.0}, "rope_theta=5.0 differs from rope_parameters"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.rope_type=.linear.; the qwen3"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_what_the_model_lacks_is_refused(folders, tmp_path, change, said):
    shutil.copytree(folders["qwen3"][0], tmp_path / "h")
    path = tmp_path / "h" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        settings_from_hf(tmp_path / "h")


@pytest.mark.parametrize(
    ("older", "said"),
    [
        ({**LLAMA3, "factor": 4.0}, "rope_scaling=.* differs from rope_parameters; correct one"),
        ({**LLAMA3, "rope_theta": 5.0}, "rope_parameters.rope_theta=10000.0 differs"),
        (LLAMA3, None),
    ],
)
def test_both_objects_on_the_rotary_embedding_must_agree(folders, tmp_path, older, said):
    """An export of an older folder has its own and the family's."""
    shutil.copytree(folders["llama31"][0], tmp_path / "h")
    path = tmp_path / "h" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": older}))
    if said is None:
        assert settings_from_hf(tmp_path / "h") == settings_from_hf(folders["llama31"][0])
        return
    with pytest.raises(ValueError, match=said):
        settings_from_hf(tmp_path / "h")


def test_keys_that_early_files_of_llama_lack_have_the_values_of_its_code():
    """As in Llama 2's config.json; a factor of 1 scales nothing."""
    config = make_autoregressive("llama", tied=False, num_key_value_heads=4).config.to_dict()
    lacking = ("rope_parameters", "rope_theta", "head_dim", "num_key_value_heads")
    early = {key: value for key, value in config.items() if key not in lacking}
    found = FAMILIES["llama"].settings(early)
    assert (found.rope_theta, found.head_width, found.num_query_groups) == (10000.0, 8, None)
    unscaled = FAMILIES["llama"].settings({**early, "rope_scaling": {**LLAMA3, "factor": 1.0}})
    assert unscaled == found and unscaled.rope_factor == 1


def test_a_tied_head_becomes_a_copy_and_added_rows_are_the_mean(folders):
    folder, _ = folders["qwen2"]
    stored = settings_from_hf(folder)
    model = replace(stored, vocab_size=85, tie_embeddings=False)
    part = started_part(HfWeights(folder, stored).part, stored, model)
    whole = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    mean = whole.double().mean(0).float()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found = part(name)
        assert tuple(found.shape) == (85, 32)
        assert torch.equal(found[:83], whole)
        assert torch.equal(found[80:85], torch.cat([whole[80:], mean[None], mean[None]]))
        assert torch.equal(found[84:85], mean[None])
    other = part("model.norm.weight")
    assert torch.equal(other[:], load_file(folder / "model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize("name", CASES)
def test_our_modelling_file_has_the_logits_of_transformers(folders, name):
    """In blocks of one token, which are causal; with the exported config.json and tensors."""
    folder, model = folders[name]
    stored = settings_from_hf(folder)
    blocks = {"attention": "block_causal", "block_length": 1, "shift": False, "mask_token_id": 0}
    ours = replace(stored, **blocks)
    config = own_config(FAMILIES[ours.family].config(ours), ours)
    assert FAMILIES[ours.family].settings(config) == ours
    module = AgrpoModel(AgrpoConfig(**config)).eval()
    module.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        found, theirs = module(_ids()).logits, model(_ids()).logits
    assert (found - theirs).abs().max() < 1e-5 * theirs.abs().max()
