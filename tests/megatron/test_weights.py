"""Weights by name: the same under any layout, and back to Hugging Face bit for bit."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agrpo_megatron.config.settings import ModelSettings, ParallelSettings, RunSettings, Settings
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.megatron.weights import export_hf, initialise, load_hf
from tests.ranks import run_ranks

HF = Path(__file__).parent.parent / "fixtures" / "llada_tiny" / "hf"
LAST = "model.transformer.ff_out.weight"
GROUPED = ModelSettings(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=51,  # padded by one row at tensor parallelism 2
    mask_token_id=50,
    qkv_bias=True,
    qk_norm=True,
)


def _network(model, tensor):
    parallel = ParallelSettings(tensor=tensor)
    settings = Settings(run=RunSettings(threads=1), model=model, parallel=parallel)
    return build_network(settings, start_ranks(settings))


def _exported(network, model):
    named = {n: p.detach() for n, p in network.named_parameters()}
    return export_hf(named, model, network.ranks)


def _load_and_export(directory, tensor):
    model = settings_from_hf(directory)
    network = _network(model, tensor)
    load_hf(network, model, directory)
    return _exported(network, model)


def _draw_and_export(tensor):
    network = _network(GROUPED, tensor)
    initialise(network, GROUPED, 7)
    padding = network.chunks[0].embedding.word_embeddings.weight[-1].detach()
    return _exported(network, GROUPED), padding


def _refusals(directories):
    """Load each directory and return what was said."""
    model = settings_from_hf(HF)
    network = _network(model, 1)
    said = []
    for directory in directories:
        with pytest.raises(ValueError, match=".") as error:
            load_hf(network, model, directory)
        said.append(str(error.value))
    return said


def _copy(folder, *, without=()):
    shutil.copytree(HF, folder)
    for name in without:
        (folder / name).unlink()
    return folder


def _damaged(folder):
    """Make directories that cannot be loaded, by their defect."""
    tensors = load_file(HF / "model.safetensors")
    made = {"whole": _copy(folder / "whole")}
    for name in ("missing", "misshapen", "extra"):
        made[name] = _copy(folder / name)
        part = dict(tensors)
        if name == "missing":
            del part[LAST]
        elif name == "extra":
            part["model.transformer.lost.weight"] = torch.zeros(2)
        else:
            part[LAST] = part[LAST][:-1].contiguous()
        save_file(part, made[name] / "model.safetensors")
    for name in ("truncated", "not safetensors"):
        made[name] = _copy(folder / name)
        whole = (HF / "model.safetensors").read_bytes()
        content = whole[: len(whole) // 2] if name == "truncated" else json.dumps({}).encode()
        (made[name] / "model.safetensors").write_bytes(content)
    made["pickled"] = _copy(folder / "pickled", without=["model.safetensors"])
    (made["pickled"] / "pytorch_model.bin").write_bytes(pickle.dumps(tensors))
    return made


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_checkpoint_goes_in_and_out_bit_for_bit(tensor):
    stored = load_file(HF / "model.safetensors")
    for exported in run_ranks(tensor, _load_and_export, HF, tensor):
        assert exported.keys() == stored.keys()
        assert all(torch.equal(exported[name], stored[name]) for name in stored)


def test_a_checkpoint_in_several_files_is_one_checkpoint(tmp_path):
    stored = load_file(HF / "model.safetensors")
    folder = _copy(tmp_path / "split", without=["model.safetensors"])
    for number in range(2):
        names = sorted(stored)[number::2]
        save_file({n: stored[n] for n in names}, folder / f"model-{number + 1}-of-2.safetensors")
    exported = run_ranks(1, _load_and_export, folder, 1)[0]
    assert all(torch.equal(exported[name], stored[name]) for name in stored)


def test_random_weights_are_the_same_under_any_layout():
    (whole, _), = run_ranks(1, _draw_and_export, 1)  # fmt: skip
    (half, _), (_, padding) = run_ranks(2, _draw_and_export, 2)
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    assert not padding.any()
    assert whole["model.transformer.blocks.0.attn_norm.weight"].eq(1).all()
    assert whole["model.transformer.blocks.0.q_proj.bias"].eq(0).all()
    std, residual = GROUPED.init_std, GROUPED.init_std / (2 * GROUPED.num_layers) ** 0.5
    for name, expected in (("q_proj", std), ("ff_proj", std), ("attn_out", residual)):
        drawn = whole[f"model.transformer.blocks.1.{name}.weight"]
        assert abs(float(drawn.std()) / expected - 1) < 0.1
    assert not torch.equal(
        whole["model.transformer.blocks.0.q_proj.weight"],
        whole["model.transformer.blocks.1.q_proj.weight"],
    )


def test_what_cannot_be_loaded_is_named(tmp_path):
    made = _damaged(tmp_path)
    wrong = {name: path for name, path in made.items() if name != "whole"}
    said = dict(zip(wrong, run_ranks(1, _refusals, list(wrong.values()))[0], strict=True))
    files = {name: made[name] / "model.safetensors" for name in made}
    assert said["missing"].startswith(f"{made['missing']}: tensor {LAST} is missing; ")
    assert said["misshapen"] == (
        f"{files['misshapen']}: tensor {LAST} has shape [159, 32], and config.json asks for "
        "[160, 32]"
    )
    assert said["extra"].startswith(
        f"{files['extra']}: tensor model.transformer.lost.weight would be lost: "
    )
    assert said["truncated"].startswith(f"{files['truncated']} is cut short: tensor model.")
    assert said["not safetensors"].startswith(
        f"{files['not safetensors']}: not a whole safetensors file ("
    )
    assert said["pickled"] == (
        f"{made['pickled']}: pytorch_model.bin is a pickle, which can run code and is never "
        "opened; save the weights as .safetensors"
    )


def test_settings_that_do_not_fit_a_checkpoint_are_refused_by_tensor():
    model = replace(settings_from_hf(HF), ffn_hidden_size=64)
    with pytest.raises(AssertionError, match=r"ff_proj\.weight has shape \[96, 32\]"):
        run_ranks(1, _load_with, model)


def _load_with(model):
    network = _network(model, 1)
    load_hf(network, model, HF)
