"""PEFT's format: its library loads what is written, and what it saves is read, with its logits."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from agrpo_megatron.config.settings import (
    LoraSettings,
    ParallelSettings,
    RunSettings,
    Settings,
)
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.families.files import HfWeights
from agrpo_megatron.families.lora import adapted_layers, trained_whole
from agrpo_megatron.families.peft import (
    CONFIG,
    TENSORS,
    lora_settings_of,
    read_peft,
    write_peft,
)
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.megatron.weights import load_named
from tests.megatron.lora.plain import PlainExperts, PlainModel, random_
from tests.megatron.lora.whole import random_adapters, whole_adapters
from tests.megatron.test_model import pack
from tests.ranks import run_ranks

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLADA, DREAM, SDAR = (FIXTURES / f"{name}_tiny" / "hf" for name in ("llada", "dream", "sdar"))
LIMIT = 1e-5  # of the largest logit
BLOCKS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
EXPORTS = {
    "all": LoraSettings(rank=4, alpha=8.0),
    "one of a fused layer": LoraSettings(rank=3, alpha=5.5, modules=["q_proj", "up_proj"]),
    "not the head": LoraSettings(rank=4, alpha=6.0, modules=["blocks.*.ff_out", "0.k_proj"]),
    "the head": LoraSettings(rank=4, alpha=3.0, rank_stabilised=True, modules=["ff_out"]),
    "the head whole": LoraSettings(rank=4, alpha=4.0, train_head=True, train_embedding=True),
}


def model_of(source):
    """Return a fixture's settings; its attention is full, and it has a mask token."""
    model = replace(settings_from_hf(source), attention="full", block_length=None)
    return model if model.mask_token_id is not None else replace(model, mask_token_id=0)


def rows_of(model):
    """Return two rows of tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, model.vocab_size, (n,), generator=generator) for n in (9, 14)]


def plain(source):
    """Return a fixture as plain modules in float64."""
    model = model_of(source)
    kind = PlainModel if model.moe.experts is None else PlainExperts
    return kind(model, load_file(source / "model.safetensors")).double()


def plain_logits(module):
    """Return the logits of all rows under one another, [T, V]."""
    settings = module.get_base_model().settings
    with torch.no_grad():
        return torch.cat([module(row) for row in rows_of(settings)])


def difference(ours, theirs):
    """Return the largest difference, relative to the largest logit, which is not small."""
    scale = float(theirs.abs().max())
    assert scale > 0.5
    return float((ours[:, : theirs.shape[1]] - theirs).abs().max()) / scale


def _network(source, lora, tensor, read):
    """Return a network with a fixture's weights, except for those that are trained whole."""
    layout = ParallelSettings(tensor=tensor)
    model = model_of(source)
    settings = Settings(run=RunSettings(threads=1), model=model, lora=lora, parallel=layout)
    network = build_network(settings, start_ranks(settings))
    network.set_training("eval")
    base, whole = HfWeights(source, model), trained_whole(model, lora).values()
    load_named(network, model, lambda name: (read if name in whole else base.part)(name))
    return network


def _logits(network, source):
    with torch.no_grad():
        return network.chunks[0](pack(rows_of(model_of(source))))


def _imported(source, folder, tensor):
    """Return this rank's columns of the logits with PEFT's adapters."""
    model = model_of(source)
    lora = lora_settings_of(folder, model)
    read = read_peft(folder, model, lora)
    network = _network(source, lora, tensor, read)
    network.adapters.fill(read)
    return _logits(network, source)


def _exported(source, lora):
    """Return our adapters by name, random ones, and the logits with them."""
    base = HfWeights(source, model_of(source))
    drawn = {
        name: base.part(name)[:] + torch.randn(base.tensors[name].shape) / 5
        for name in trained_whole(model_of(source), lora).values()
    }
    network = _network(source, lora, 1, drawn.__getitem__)
    random_adapters(network)
    return {**drawn, **whole_adapters(network)}, _logits(network, source)


def adapted_by_peft(module):
    """Return the names of the layers that have adapters of the library's."""
    named = module.get_base_model().named_modules()
    return {name for name, part in named if isinstance(part, LoraLayer)}


def made_by_peft(source, folder, **options):
    """Save an adapter of the library's with random matrices; return it."""
    module = get_peft_model(plain(source), LoraConfig(**options)).double()
    random_(module, ("lora_", "modules_to_save"), 0.2)
    module.save_pretrained(folder)
    return module.eval()


@pytest.mark.parametrize("name", EXPORTS)
def test_peft_loads_an_export_and_has_our_logits(tmp_path, name):
    check_export(tmp_path, LLADA, EXPORTS[name])


def check_export(tmp_path, source, lora):
    """Check that PEFT has our logits with an export, which comes back with the same bytes."""
    model = model_of(source)
    tensors, ours = run_ranks(1, _exported, source, lora)[0]
    options = {"model": model, "lora": lora, "base": "GSAI-ML/LLaDA", "dtype": torch.float32}
    write_peft(tmp_path, tensors.__getitem__, **options)
    module = PeftModel.from_pretrained(plain(source), tmp_path).double().eval()
    assert adapted_by_peft(module) == {layer.name for layer in adapted_layers(model, lora)}
    assert difference(ours, plain_logits(module)) < LIMIT
    with module.disable_adapter():
        assert difference(ours, plain_logits(module)) > 0.1
    again = lora_settings_of(tmp_path, model)
    assert adapted_layers(model, again) == adapted_layers(model, lora)
    assert again == replace(lora, modules=again.modules, load=str(tmp_path))
    written = [(tmp_path / file).read_bytes() for file in (CONFIG, TENSORS)]
    write_peft(tmp_path, read_peft(tmp_path, model, again), **options)
    assert written == [(tmp_path / file).read_bytes() for file in (CONFIG, TENSORS)]


@pytest.mark.parametrize(
    ("source", "tensor", "options"),
    [
        (LLADA, 1, {"target_modules": list(BLOCKS), "r": 4, "lora_alpha": 6}),
        (LLADA, 2, {"target_modules": ["v_proj", "ff_proj", "attn_out"], "use_rslora": True}),
        (LLADA, 2, {"target_modules": ["ff_out"], "modules_to_save": ["wte"]}),
        (DREAM, 2, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
        (SDAR, 1, {"target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"]}),
    ],
)
def test_what_peft_saves_is_read_and_has_its_logits(tmp_path, source, tensor, options):
    check_import(tmp_path, source, tensor, options)


def check_import(tmp_path, source, tensor, options):
    """Check that our logits with adapters of the library's are its own."""
    module = made_by_peft(source, tmp_path, **options)
    shards = run_ranks(tensor, _imported, source, tmp_path, tensor)
    assert difference(torch.cat(shards, 1), plain_logits(module)) < LIMIT


def test_tensors_come_back_byte_for_byte(tmp_path):
    """In PEFT's own file too, except for the order of keys in its header."""
    options = {"target_modules": list(BLOCKS), "exclude_modules": ["model.transformer.ff_out"]}
    module = made_by_peft(LLADA, tmp_path / "theirs", modules_to_save=["wte"], **options)
    model = model_of(LLADA)
    lora = lora_settings_of(tmp_path / "theirs", model)
    assert lora.modules is None and lora.train_embedding and lora.alpha == 8
    read = read_peft(tmp_path / "theirs", model, lora)
    written = {"model": model, "lora": lora, "base": None, "dtype": torch.float64}
    write_peft(tmp_path / "ours", read, **written)
    ours, theirs = (tmp_path / who / TENSORS for who in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    config = LoraConfig.from_pretrained(tmp_path / "ours").to_dict()
    expected = module.peft_config["default"].to_dict()
    ways = ("target_modules", "modules_to_save", "exclude_modules", "auto_mapping")
    assert {key for key in config if config[key] != expected[key]} - set(ways) == {"inference_mode"}


def test_other_writers_leave_the_adapters_name_in(tmp_path):
    made_by_peft(LLADA, tmp_path, target_modules=["q_proj"], modules_to_save=["wte"])
    tensors, model = load_file(tmp_path / TENSORS), model_of(LLADA)
    renamed = {
        name.replace(".weight", ".default.weight")
        if "lora" in name
        else name.replace("wte", "wte.modules_to_save.default"): tensor
        for name, tensor in tensors.items()
    }
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, tmp_path / TENSORS)
    read = read_peft(tmp_path, model, lora_settings_of(tmp_path, model))
    for name, tensor in tensors.items():
        assert torch.equal(read(name.removeprefix("base_model.model."))[:], tensor)
    name = next(name for name in tensors if "lora" in name)
    save_file({**renamed, name: tensors[name].clone()}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="two adapters in one file; save one of them"):
        lora_settings_of(tmp_path, model)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Return a folder with an adapter of PEFT's on all layers of the blocks, and its settings."""
    folder = tmp_path_factory.mktemp("adapter")
    ends = list(BLOCKS)
    made_by_peft(LLADA, folder, target_modules=ends, exclude_modules=["model.transformer.ff_out"])
    return folder, LoraSettings(rank=8, alpha=8.0)


def _copied(adapter, folder, config=(), tensors=()):
    """Copy an adapter with changed keys and tensors; None removes one."""
    source, lora = adapter
    keys = {**json.loads((source / CONFIG).read_text()), **dict(config)}
    (folder / CONFIG).write_text(json.dumps(keys))
    changed = {**load_file(source / TENSORS), **dict(tensors)}
    save_file({k: t for k, t in changed.items() if t is not None}, folder / TENSORS)
    return folder, model_of(LLADA), lora


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 16, "r=16 differs from lora.rank=8; set lora.rank=16"),
        ("lora_alpha", 4, "lora_alpha=4 differs from lora.alpha=8; set lora.alpha=4"),
        ("use_rslora", True, "use_rslora=True differs from lora.rank_stabilised=false; set"),
        ("peft_type", "LOHA", "peft_type='LOHA'; only \"LORA\" is supported"),
        ("bias", "all", "bias='all'; only \"none\" is supported"),
        ("fan_in_fan_out", True, "fan_in_fan_out=True; only false is supported"),
        ("use_dora", True, "use_dora=True; only false is supported"),
        ("rank_pattern", {"q_proj": 4}, "rank_pattern={'q_proj': 4}; each layer has to have"),
        ("alpha_pattern", {"q_proj": 4}, "each layer has to have the same lora_alpha"),
        ("init_lora_weights", "pissa", "it changed the weights of the base"),
        ("lora_bias", True, "lora_bias=True; it is not supported"),
        ("new_in_some_version", {"a": 1}, "new_in_some_version={'a': 1}; it is not supported"),
    ],
)
def test_other_adapters_than_settings_ask_for_are_refused(adapter, tmp_path, key, value, message):
    arguments = _copied(adapter, tmp_path, config={key: value})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_peft(*arguments)
    assert str(error.value).startswith(f"{tmp_path / CONFIG}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rank_pattern", {"q_proj": 8}), ("init_lora_weights", "gaussian"), ("lora_dropout", 0.1)],
)
def test_keys_that_change_no_logits_pass(adapter, tmp_path, key, value):
    folder, model, lora = _copied(adapter, tmp_path, config={key: value})
    read_peft(folder, model, lora)
    assert lora_settings_of(folder, model).rank == lora.rank


Q, WTE = "model.transformer.blocks.0.q_proj.lora_A.weight", "model.transformer.wte.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "changes", "message"),
    [
        (Q, None, {}, f"lora.modules=null asks for tensor {Q}, which is missing"),
        (Q, torch.zeros(8, 31), {}, f"tensor {Q} has shape [8, 31], and settings ask for [8, 32]"),
        (Q, torch.zeros(8, 32).int(), {}, "has dtype torch.int32; save it as float32 or bfloat16"),
        (WTE, torch.zeros(1), {}, f"lora.train_embedding=false would lose tensor {WTE}; use true"),
        (Q, torch.zeros(8, 32), {"train_head": True}, "lora.train_head=true asks for tensor"),
        (Q, torch.zeros(8, 32), {"modules": ["q_proj"]}, "and 23 more; use lora.modules=null"),
        (f"model.{Q}", torch.zeros(1), {}, "would be lost: the llada family has no such tensor"),
    ],
)
def test_missing_and_unknown_tensors_are_refused(adapter, tmp_path, name, tensor, changes, message):
    changed = {f"base_model.model.{name}": tensor}
    folder, model, lora = _copied(adapter, tmp_path, tensors=changed)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_peft(folder, model, replace(lora, **changes))
    assert "\n" not in str(error.value)


def test_foreign_files_are_refused(adapter, tmp_path):
    folder, model, lora = _copied(adapter, tmp_path, tensors={"q_proj.lora_A": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"tensor q_proj.lora_A; PEFT's names start with base_mod"):
        read_peft(folder, model, lora)
    (folder / TENSORS).unlink()
    with pytest.raises(ValueError, match="no adapter_model.safetensors; give a folder"):
        read_peft(folder, model, lora)
    (folder / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match="is a pickle, which can run code and is never opened"):
        read_peft(folder, model, lora)
