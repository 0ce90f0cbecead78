"""Files of one checkpoint agree: an index, its shards, dtypes of a stack, config.json of an export.

What does not come back byte for byte is refused before anything is written.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agrpo_megatron.checkpoint.convert import to_hf_directory, to_megatron_checkpoint
from agrpo_megatron.checkpoint.integrity import MANIFEST
from agrpo_megatron.checkpoint.model_files import architecture, read_model, write_model_files
from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.families.files import INDEX, HfWeights, read_index
from tests.text.chat_tokenizers import write_llada

FIXTURES = Path(__file__).parent.parent / "fixtures"
LLADA, DREAM = FIXTURES / "llada_tiny" / "hf", FIXTURES / "dream_tiny" / "hf"
BLOCK = "model.transformer.blocks.{}."
HEAD = "model.transformer.ff_out.weight"


def _quiet(_done, _total):
    pass


def _there_and_back(folder, source, **options):
    to_megatron_checkpoint(source, folder / "m", progress=_quiet, **options)
    to_hf_directory(folder / "m", folder / "h", progress=_quiet)
    return folder / "h"


def _files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def _refusal(folder, source, **options):
    """Return the one line that refuses a conversion; nothing may be written."""
    with pytest.raises(ValueError, match=".") as error:
        to_megatron_checkpoint(source, folder / "m", progress=_quiet, **options)
    assert "\n" not in str(error.value) and str(source) in str(error.value)
    assert not [path for path in folder.iterdir() if path.name.endswith(("m", ".partial"))]
    return str(error.value)


def _indexed(folder, file, **changes):
    """Copy the model with an index that puts its tensors into a file."""
    shutil.copytree(LLADA, folder)
    names = load_file(folder / "model.safetensors")
    if isinstance(file, str) and file.endswith("safetensors") and "\0" not in file:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").rename(folder / file)
    weight_map = dict.fromkeys(sorted(names), file)
    size = sum(tensor.nbytes for tensor in names.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map, **changes}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder


OUTSIDE = {
    "absolute": "/shared/weights.safetensors",
    "up": "../shared/weights.safetensors",
    "down and up": "parts/../../shared/weights.safetensors",
    "up and back": "../s/weights.safetensors",
    "up at the end": "parts/..",
    "another kind of file": "config.json",
    "the folder": "",
    "a number": 5,
    "null": None,
    "a list": ["model.safetensors"],
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_of_its_folder(tmp_path, name):
    source = shutil.copytree(LLADA, tmp_path / "s")
    index = {"weight_map": {HEAD: OUTSIDE[name]}}
    (source / INDEX).write_text(json.dumps(index))
    message = _refusal(tmp_path, source)
    assert message.startswith(f"{source / INDEX}: weight_map={{'{HEAD}': {OUTSIDE[name]!r}"[:150])
    assert message.endswith("; name a .safetensors file in this folder or below it")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "it has no weight_map"),
        ('{"weight_map": []}', "it has no weight_map"),
        ("[]", "not a JSON object"),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "'a' is written twice"),
        ('{"weight_map": {"a": "b\\u0000.safetensors"}}', "is missing (tensor a is in it)"),
        ('{"weight_map": {"a": "%s.safetensors"}}' % ("b" * 999), "is missing (tensor a is in it)"),
    ],
)
def test_an_index_that_cannot_be_used_is_refused(tmp_path, content, said):
    source = shutil.copytree(LLADA, tmp_path / "s")
    (source / INDEX).write_text(content)
    assert said in _refusal(tmp_path, source)


def test_an_index_of_an_edited_checkpoint_is_refused_before_anything_is_written(tmp_path):
    to_megatron_checkpoint(LLADA, tmp_path / "m", progress=_quiet)
    (tmp_path / "m" / MANIFEST).unlink()
    index = {
        "weight_map": dict.fromkeys(load_file(LLADA / "model.safetensors"), "../x.safetensors")
    }
    (tmp_path / "m" / "hf" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="name a .safetensors file in this folder or below it"):
        to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "file",
    ["parts/weights.safetensors", "a/b/c.safetensors", "..model.safetensors", "w.safetensors"],
)
def test_shards_below_the_folder_come_back(tmp_path, file):
    source = _indexed(tmp_path / "s", file)
    assert _files(_there_and_back(tmp_path, source)) == _files(source)


def test_links_are_followed(tmp_path):
    """Downloads of the hub are links to blobs outside of the folder, and a folder may be one."""
    source, blobs = _indexed(tmp_path / "s", "parts/weights.safetensors"), tmp_path / "blobs"
    (source / "parts").rename(blobs)
    (source / "parts").symlink_to(blobs)
    config = (source / "config.json").rename(blobs / "0123")
    (source / "config.json").symlink_to(config)
    back = _there_and_back(tmp_path, source)
    assert (back / "parts" / "weights.safetensors").read_bytes() == (
        LLADA / "model.safetensors"
    ).read_bytes()
    assert not any(path.is_symlink() for path in back.rglob("*"))


@pytest.mark.parametrize("metadata", [None, [], {}, {"total_size": 1, "more": 2}])
def test_whatever_the_metadata_of_an_index_is_the_weights_come_back(tmp_path, metadata):
    source = _indexed(tmp_path / "s", "w.safetensors", metadata=metadata)
    back = _there_and_back(tmp_path, source)
    assert (back / "w.safetensors").read_bytes() == (source / "w.safetensors").read_bytes()
    assert read_index(back) == read_index(source)


def test_a_tensor_that_is_not_where_the_index_says_is_refused(tmp_path):
    source = _indexed(tmp_path / "s", "a.safetensors")
    save_file({"more": torch.zeros(1)}, source / "b.safetensors")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] |= {HEAD: "b.safetensors", "more": "b.safetensors"}
    (source / INDEX).write_text(json.dumps(index))
    assert _refusal(tmp_path, source) == f"{source / INDEX}: tensor {HEAD} is not in b.safetensors"
    index["weight_map"] |= {HEAD: "a.safetensors", "lost": "b.safetensors"}
    (source / INDEX).write_text(json.dumps(index))
    assert _refusal(tmp_path, source).endswith("tensor lost is not in b.safetensors")


def test_a_file_that_other_tools_prefer_to_the_index_is_refused(tmp_path):
    source = _indexed(tmp_path / "s", "w.safetensors")
    shutil.copy(LLADA / "model.safetensors", source)
    assert "leaves out model.safetensors, which other tools read" in _refusal(tmp_path, source)


def _cast(folder, source, kinds):
    """Copy a model in bf16, except for tensors whose names end in some texts."""
    folder.mkdir()
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        found = [kind for end, kind in kinds.items() if name.endswith(end)]
        tensors[name] = tensor.to(found[0] if found else torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MIXED = {
    "the last layer": (LLADA, {"blocks.1.ff_out.weight": torch.float32}),
    "the first layer": (LLADA, {"blocks.0.attn_out.weight": torch.float32}),
    "a norm": (LLADA, {"blocks.1.attn_norm.weight": torch.float32}),
    "a query": (LLADA, {"blocks.0.q_proj.weight": torch.float32}),
    "a half": (LLADA, {"blocks.1.up_proj.weight": torch.float16}),
    "a middle layer": (DREAM, {"layers.1.mlp.down_proj.weight": torch.float64}),
    "a bias": (DREAM, {"layers.2.self_attn.k_proj.bias": torch.float32}),
}


@pytest.mark.parametrize("name", MIXED)
def test_dtypes_that_differ_in_a_stack_are_refused_and_can_be_chosen(tmp_path, name):
    original, kinds = MIXED[name]
    source = _cast(tmp_path / "s", original, kinds)
    ((end, kind),) = kinds.items()
    message = _refusal(tmp_path, source)
    assert f"{end} ({kind})" in message and "(torch.bfloat16)" in message and "--dtype" in message
    back = load_file(_there_and_back(tmp_path, source, dtype="fp32") / "model.safetensors")
    written = load_file(source / "model.safetensors")
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in written.items())


WHOLE = {
    "all norms": (LLADA, {"norm.weight": torch.float32, "ln_f.weight": torch.float32}),
    "the head": (LLADA, {"transformer.ff_out.weight": torch.float32}),
    "the embedding": (DREAM, {"embed_tokens.weight": torch.float32}),
    "all attention": (LLADA, {f"{part}_proj.weight": torch.float32 for part in "qkv"}),
    "all biases": (DREAM, {"bias": torch.float64}),
    "one kind": (DREAM, {"weight": torch.float16, "bias": torch.float16}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_dtypes_that_are_one_in_each_stack_come_back(tmp_path, name):
    source = _cast(tmp_path / "s", *WHOLE[name])
    name = "model.safetensors"
    assert (_there_and_back(tmp_path, source) / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("is_indexed", [False, True])
@pytest.mark.parametrize(
    ("original", "names"),
    [
        (DREAM, [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3)]),
        (LLADA, ["model.transformer.blocks.0.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
    ],
)
def test_rotary_buffers_of_old_checkpoints_are_left_out(tmp_path, original, names, is_indexed):
    source = shutil.copytree(original, tmp_path / "s")
    tensors = load_file(source / "model.safetensors")
    buffers = {name: torch.ones(4) for name in names}
    save_file({**tensors, **buffers}, source / "model.safetensors", metadata={"format": "pt"})
    if is_indexed:
        (source / "model.safetensors").rename(source / "w.safetensors")
        index = {"weight_map": dict.fromkeys([*tensors, *buffers], "w.safetensors")}
        (source / INDEX).write_text(json.dumps(index))
    assert set(HfWeights(source, settings_from_hf(source)).tensors) == set(tensors)
    back = _there_and_back(tmp_path, source)
    assert set(read_index(back) or tensors) == set(tensors)
    file = "w.safetensors" if is_indexed else "model.safetensors"
    assert (back / file).read_bytes() == (original / "model.safetensors").read_bytes()


def _exported_config(folder, model, *sources):
    """Return config.json of an export of a checkpoint with some model settings and files."""
    to_megatron_checkpoint(LLADA, folder / "m", progress=_quiet)
    (folder / "m" / MANIFEST).unlink()
    shutil.rmtree(folder / "m" / "hf")
    write_model_files(folder / "m", model, sources)
    to_hf_directory(folder / "m", folder / "h", progress=_quiet)
    assert architecture(settings_from_hf(folder / "h")) == architecture(read_model(folder / "m"))
    return json.loads((folder / "h" / "config.json").read_text())


@pytest.mark.parametrize("is_file", [False, True])
def test_another_tokenizer_replaces_the_whole_tokenizer_and_nothing_else(tmp_path, is_file):
    base, other = tmp_path / "base", tmp_path / "other"
    for folder, names in (
        (base, ["config.json", "modeling_a.py", "tokenizer.json", "merges.txt", "a.jinja"]),
        (other, ["config.json", "modeling_a.py", "tokenizer.model", "tokenization_b.py"]),
    ):
        folder.mkdir()
        for name in [*names, "tokenizer_config.json"]:
            (folder / name).write_text(folder.name)
    second = other / "tokenizer.model" if is_file else other
    write_model_files(tmp_path / "m", ModelSettings(), [base, second])
    found = {path.name: path.read_text() for path in (tmp_path / "m" / "hf").iterdir()}
    kept = dict.fromkeys(["config.json", "modeling_a.py", "a.jinja"], "base")
    more = [] if is_file else ["tokenization_b.py", "tokenizer_config.json"]
    assert found == kept | dict.fromkeys(["tokenizer.model", *more], "other")


def _other(folder, **changes):
    """Write a folder with a config.json that is not the model's."""
    folder.mkdir()
    config = {**json.loads((LLADA / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_sequence_length": 128},
        {"rope_theta": 10000.0, "norm_epsilon": 1e-3},
        {"eos_token_id": 150, "mask_token_id": 151},
        {"init_std": 0.5},
    ],
)
def test_an_exported_config_describes_the_model_and_keeps_the_rest(tmp_path, changes):
    """Settings may replace those of the weights that a run starts from."""
    kept = {"auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}, "precision": "amp_bf16"}
    source, generation = _other(tmp_path / "base", **kept), '{"eos_token_id": [158, 157]}'
    (source / "generation_config.json").write_text(generation)
    config = _exported_config(tmp_path, replace(settings_from_hf(LLADA), **changes), source)
    assert {key: config[key] for key in kept} == kept
    assert (tmp_path / "h" / "generation_config.json").read_text() == generation
    assert config["max_sequence_length"] == changes.get("max_sequence_length", 4096)


def test_an_exported_config_is_not_that_of_the_tokenizer(tmp_path):
    """A tokenizer's folder may bring a config.json: none, of another model, or a damaged one."""
    model = settings_from_hf(LLADA)
    folders = {
        "only its kind": write_llada(tmp_path / "llada"),
        "another model": _other(tmp_path / "large", d_model=64, n_layers=3),
        "another family": shutil.copytree(DREAM, tmp_path / "dream"),
        "unknown keys": _other(tmp_path / "experts", num_experts=4),
        "damaged": _other(tmp_path / "damaged"),
    }
    (folders["damaged"] / "config.json").write_text("{")
    for number, source in enumerate(folders.values()):
        (tmp_path / str(number)).mkdir()
        config = _exported_config(tmp_path / str(number), model, source)
        assert config["d_model"] == 32 and not {"num_experts", "hidden_act"} & set(config)
    generation = json.loads((tmp_path / "2" / "h" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == model.eos_token_id, "not Dream's"
