"""Exports with our modelling file give our logits in the pinned transformers and in an older one.

`make hf` installs the older one, with which LLaDA's own modelling code works.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agrpo_megatron.checkpoint.convert import to_hf_directory, to_megatron_checkpoint
from agrpo_megatron.checkpoint.exports.modeling_agrpo import AgrpoConfig, AgrpoModel
from agrpo_megatron.checkpoint.model_files import config_of
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.packing import pack
from agrpo_megatron.diffusion.patterns import block_causal
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.families.files import HfWeights
from tests.families.nemotron import write_nemotron
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
FIXTURES = ROOT / "tests" / "fixtures"
OLDER = ROOT / ".venv-hf"
NAMES = ["llada_tiny", "dream_tiny", "sdar_tiny", "sdarmoe_tiny", "lladamoe_tiny", "llada2_tiny"]
MASKS = {"sdarmoe_tiny": 380, "lladamoe_tiny": 383, "llada2_tiny": 382}  # config.json lacks them
LENGTHS = [24, 17]  # the second row is padded, in the middle of a block
# Loads each folder, the first by three classes, as a user does, and stores what it computes. What
# the last one saves loads again.
LOAD = """
import json, sys, torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
lengths, *folders, output = sys.argv[1:]
found = {"version": transformers.__version__}
for folder in folders:
    ids = torch.load(folder + "/../ids.pt")
    mask = (torch.arange(ids.shape[1]) < torch.tensor(json.loads(lengths))[:, None]).long()
    more = (AutoModelForCausalLM, AutoModelForMaskedLM) if folder == folders[0] else ()
    for kind in (*more, AutoModel):
        model = kind.from_pretrained(folder, trust_remote_code=True)
        assert not model.training and model.config.model_type == "agrpo"
    with torch.no_grad():
        found[folder] = [model(input_ids=ids, attention_mask=mask).logits, model(ids).logits]
model.save_pretrained(folder + "-again")
again = AutoModel.from_pretrained(folder + "-again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(ids).logits, found[folder][1])
torch.save(found, output)
"""


def _quiet(_done, _total):
    pass


def engine_logits(folders):
    """Return the logits of all tokens of two rows by the engine, for each folder; on one rank."""
    from agrpo_megatron.megatron.network import build_network
    from agrpo_megatron.megatron.parallel import start_ranks
    from agrpo_megatron.megatron.pipeline import forward_rows
    from agrpo_megatron.megatron.weights import load_named

    found, ranks = [], None
    for folder in folders:
        model = settings_from_hf(folder)
        ids = torch.load(folder.parent / "ids.pt")
        settings = Settings(model=model)
        ranks = ranks or start_ranks(settings)
        network = build_network(settings, ranks)
        load_named(network, model, HfWeights(folder, model).part)
        patterns = None
        if model.has_blocks:
            patterns = [block_causal(length, model.block_length) for length in LENGTHS]
        scored = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
        rows = pack(ids, torch.tensor(LENGTHS), scored, patterns=patterns)
        found.append(forward_rows(network, [rows], lambda _, logits: logits)[0].cpu())
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export each family with our modelling file; return the folders and the engine's logits."""
    folders = []
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        source = folder / "source"
        shutil.copytree(FIXTURES / name / "hf", source)
        config = json.loads((source / "config.json").read_text())
        config.setdefault("mask_token_id", MASKS.get(name))
        (source / "config.json").write_text(json.dumps(config))
        to_megatron_checkpoint(source, folder / "m", progress=_quiet, dtype="fp32")
        said = to_hf_directory(folder / "m", folder / "h", progress=_quiet, own_code=True)
        assert said == "AutoModel with trust_remote_code=True, transformers 4.46 to 5.23"
        generator = torch.Generator().manual_seed(0)
        size = config.get("vocab_size")
        torch.save(torch.randint(size, (2, LENGTHS[0]), generator=generator), folder / "ids.pt")
        folders.append(folder / "h")
    return folders, run_ranks(1, engine_logits, folders)[0]


def _gap(theirs, ours):
    """Return the largest difference, relative to the largest logit."""
    return float((theirs - ours).abs().max() / ours.abs().max())


@pytest.mark.parametrize("version", ["pinned", "older"])
def test_transformers_gives_our_logits(exported, version, tmp_path):
    folders, ours = exported
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    if version == "older":
        if not (OLDER / "transformers").is_dir():
            assert "AGRPO_REQUIRE_HF" not in os.environ, f"{OLDER} is missing"
            pytest.skip("needs `make hf`")
        environment["PYTHONPATH"] = str(OLDER)
    places = [tmp_path / str(number) / "h" for number in range(len(folders))]
    for folder, place in zip(folders, places, strict=True):
        shutil.copytree(folder.parent, place.parent)
    arguments = [str(LENGTHS), *map(str, places), str(tmp_path / "found.pt")]
    command = [sys.executable, "-c", LOAD, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "You are using a model of type" not in ran.stderr
    found = torch.load(tmp_path / "found.pt")
    assert found["version"].startswith("4.46" if version == "older" else "5.")
    first, second = LENGTHS
    for place, logits in zip(places, ours, strict=True):
        padded, plain = found[str(place)]
        for theirs in (padded[0], plain[0]):
            assert _gap(theirs, logits[:first]) < 1e-5
        assert _gap(padded[1, :second], logits[first:]) < 1e-5


def test_our_own_import_reads_the_export(exported):
    """The architecture and every byte of every tensor are those of the source."""
    for folder in exported[0]:
        source = folder.parent / "source"
        assert settings_from_hf(folder) == settings_from_hf(source)
        ours, theirs = (
            {n: t.float() for n, t in load_file(f).items()}
            for f in (folder / "model.safetensors", source / "model.safetensors")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        config = json.loads((folder / "config.json").read_text())
        dropouts = {key: value for key, value in config.items() if key.endswith("dropout")}
        assert dropouts and set(dropouts.values()) == {0.0}


def test_a_family_without_our_code_is_named(tmp_path):
    source = write_nemotron(tmp_path / "source")
    to_megatron_checkpoint(source, tmp_path / "m", progress=_quiet)
    with pytest.raises(ValueError, match="model.family=nemotron_diffusion: the modelling file of"):
        to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet, own_code=True)
    assert not (tmp_path / "h").exists()
    said = to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet)
    assert said.startswith("no modelling files, and transformers has no nemotron_labs_diffusion")


def test_what_the_family_writes_replaces_what_its_own_code_ignores(tmp_path):
    """LLaDA-MoE's code reads no setting of its router, and takes 1 for a list; ours reads both."""
    shutil.copytree(FIXTURES / "lladamoe_tiny" / "hf", tmp_path / "h")
    path = tmp_path / "h" / "config.json"
    other = {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "moe_layer_freq": 1}
    ends = {"eos_token_id": [380, 381], "pad_token_id": 379, "mask_token_id": 383}
    path.write_text(json.dumps(json.loads(path.read_text()) | other | ends))
    model = settings_from_hf(tmp_path / "h")
    config, is_own = config_of(model, "float32", tmp_path / "h", own_code=True)
    assert is_own and "norm_topk_prob" not in config
    assert (config["routed_scaling_factor"], config["moe_layer_freq"]) == (1.0, [1, 1, 1])
    assert {key: config[key] for key in ends} == ends


def test_inputs_that_would_be_ignored_are_refused():
    config = AgrpoConfig(
        agrpo_family="sdar",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
    )
    model, ids = AgrpoModel(config).eval(), torch.arange(4)[None]
    found = model(ids, position_ids=None, use_cache=True, return_dict=True, output_attentions=False)
    assert found.logits.shape == (1, 4, 8)
    given = {"position_ids": ids, "past_key_values": (), "labels": ids, "return_dict": False}
    for name, value in {**given, "output_hidden_states": True}.items():
        with pytest.raises(ValueError, match=f"{name} is given, and this model gives logits"):
            model(ids, **{name: value})
