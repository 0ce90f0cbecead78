"""Hugging Face to Megatron and back: every byte returns, through any layout; damage is named."""

import json
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from agrpo_megatron.checkpoint import convert, torch_dist
from agrpo_megatron.checkpoint.convert import to_hf_directory, to_megatron_checkpoint
from agrpo_megatron.checkpoint.integrity import Damaged
from agrpo_megatron.checkpoint.model_files import read_model
from agrpo_megatron.checkpoint.torch_dist import read_metadata
from agrpo_megatron.checkpoint.weights import MegatronWeights
from agrpo_megatron.families import hf_shapes, settings_from_hf
from agrpo_megatron.runs.progress import HF, Progress
from tests.families.nemotron import write_nemotron
from tests.ranks import run_ranks
from tests.training.tiny import tiny

FIXTURES = Path(__file__).parent.parent / "fixtures"
EXPERTS = {"sdarmoe_tiny": 380, "lladamoe_tiny": 383, "llada2_tiny": 382}  # and the mask token
FAMILIES = ["llada_tiny", "dream_tiny", "sdar_tiny", "nemotron", *EXPERTS]
LLADA = FIXTURES / "llada_tiny" / "hf"
HEAD = "model.transformer.ff_out.weight"


def _quiet(_done, _total):
    pass


def _files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.fixture(params=FAMILIES)
def source(request, tmp_path_factory):
    """Return a small checkpoint of each family."""
    if request.param == "nemotron":
        return write_nemotron(tmp_path_factory.mktemp("published") / "hf")
    if request.param in EXPERTS:
        return _with_mask(tmp_path_factory.mktemp("published") / "hf", request.param)
    return FIXTURES / request.param / "hf"


def _with_mask(folder, name):
    """Write a copy whose configuration has the mask token, which published files lack."""
    shutil.copytree(FIXTURES / name / "hf", folder)
    config = folder / "config.json"
    keys = {**json.loads(config.read_text()), "mask_token_id": EXPERTS[name]}
    config.write_text(json.dumps(keys, indent=1))
    return folder


def _sharded(folder, source):
    """Write a directory in bf16 of three shards with an index, a template and a tokenizer."""
    folder.mkdir()
    stored = [load_file(file) for file in sorted(source.glob("*.safetensors"))]
    tensors = {name: tensor.bfloat16() for part in stored for name, tensor in part.items()}
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = dict(list(tensors.items())[number::3])
        save_file(part, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
        index["metadata"]["total_size"] += sum(t.nbytes for t in part.values())
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((source / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "modeling_own.py").write_text("# carried along\n")
    return folder


def test_every_byte_returns(tmp_path, source):
    steps = []
    to_megatron_checkpoint(source, tmp_path / "m", progress=lambda *step: steps.append(step))
    to_hf_directory(tmp_path / "m", tmp_path / "h", progress=lambda *step: steps.append(step))
    assert _files(tmp_path / "h") == _files(source)
    assert all(done <= total for done, total in steps) and steps[-1][0] == steps[-1][1]
    assert {p.name for p in tmp_path.iterdir()} == {"m", "h"}


def test_a_config_without_blocks_and_mask_returns_as_it_was(tmp_path):
    """SDAR's published file lacks both keys; the settings have the published engines' values."""
    source = tmp_path / "s"
    source.mkdir()
    config = json.loads((FIXTURES / "sdar_tiny" / "hf" / "config.json").read_text())
    del config["block_size"], config["mask_token_id"]
    config |= {"vocab_size": 151936, "hidden_size": 8, "num_hidden_layers": 1}
    config["torch_dtype"] = "bfloat16"
    (source / "config.json").write_text(json.dumps(config, indent=1))
    model = settings_from_hf(source)
    assert (model.block_length, model.mask_token_id) == (4, 151669)
    shapes = hf_shapes(model).items()
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    to_megatron_checkpoint(source, tmp_path / "m", progress=_quiet)
    assert read_model(tmp_path / "m") == model
    to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet)
    assert _files(tmp_path / "h") == _files(source)


def test_every_byte_of_several_shards_returns(tmp_path, source):
    source = _sharded(tmp_path / "s", source)
    to_megatron_checkpoint(source, tmp_path / "m", progress=_quiet)
    to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet)
    assert _files(tmp_path / "h") == _files(source)


@pytest.mark.parametrize("has_index", [False, True])
def test_merged_experts_return_as_they_were(tmp_path, has_index):
    """Its type, or an index, shows that one tensor holds all experts of a layer."""
    plain = _with_mask(tmp_path / "plain", "llada2_tiny")
    merged, stacks = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        prefix, _, rest = name.partition(".experts.")
        number, _, part = rest.partition(".")
        if rest:
            stacks.setdefault(f"{prefix}.experts.{part.removesuffix('.weight')}", {})[
                int(number)
            ] = tensor
        else:
            merged[name] = tensor
    merged |= {n: torch.stack([s[e] for e in range(len(s))]) for n, s in stacks.items()}
    source = tmp_path / "s"
    shutil.copytree(plain, source)
    save_file(merged, source / "model.safetensors", metadata={"format": "pt"})
    if has_index:
        files = dict.fromkeys(sorted(merged), "model.safetensors")
        size = sum(tensor.nbytes for tensor in merged.values())
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (source / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    else:
        config = json.loads((source / "config.json").read_text())
        config["model_type"] = "llada2_moe_veomni"
        (source / "config.json").write_text(json.dumps(config))
    to_megatron_checkpoint(source, tmp_path / "m", progress=_quiet)
    assert (
        MegatronWeights(tmp_path / "m").tensors.keys() == hf_shapes(settings_from_hf(plain)).keys()
    )
    to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet)
    assert _files(tmp_path / "h") == _files(source)


def _through(source, target, overrides):
    """Load a checkpoint at this layout and save it from there."""
    from agrpo_megatron.checkpoint.saving import Saver
    from agrpo_megatron.checkpoint.start import load_start_weights
    from agrpo_megatron.megatron.engine import build_engine
    from agrpo_megatron.megatron.parallel import start_ranks

    settings = tiny(*overrides)
    settings = type(settings)(
        run=settings.run,
        precision=settings.precision,
        parallel=settings.parallel,
        model=read_model(Path(source)),
    )
    model = replace(settings.model, load=str(source))
    ranks = start_ranks(settings)
    engine = build_engine(settings, settings.optimizer, iterations=1, ranks=ranks)
    load_start_weights(engine.network, replace(settings, model=model))
    engine.optimizer.reload_model_params()
    files = Path(target) / "files"
    if dist.get_rank() == 0:
        files.mkdir()
        shutil.copytree(Path(source) / HF, files / HF)
        shutil.copy(Path(source) / "model.yaml", files)
    saver = Saver(Path(target), engine, keep=1, is_async=False, files=files)
    return saver.save(Progress("rl", 1, {}))


LAYOUTS = {"tp1": 1, "tp2": 2, "pp2": 2, "tp2-pp2": 4}
EXPERT_LAYOUTS = {"ep2": 2, "tp2-sp": 2, "pp2-ep2": 4}


@pytest.mark.parametrize("layout", LAYOUTS | EXPERT_LAYOUTS)
def test_every_byte_returns_through_a_layout(tmp_path, source, layout):
    has_experts = settings_from_hf(source).moe.experts is not None
    if layout not in (EXPERT_LAYOUTS if has_experts else LAYOUTS):
        pytest.skip("a layout for models without experts, or with them")
    to_megatron_checkpoint(source, tmp_path / "m", progress=_quiet)
    size = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    dtype = json.loads((source / "config.json").read_text()).get("torch_dtype")
    overrides = [f"parallel={layout}", f"precision={'bf16' if dtype == 'bfloat16' else 'fp32'}"]
    results = run_ranks(size, _through, tmp_path / "m", tmp_path, overrides)
    to_hf_directory(results[0], tmp_path / "h", progress=_quiet)
    ours, theirs = _files(tmp_path / "h"), _files(source)
    assert ours == theirs


def test_the_dtype_can_be_chosen_and_config_says_so(tmp_path):
    to_megatron_checkpoint(LLADA, tmp_path / "m", progress=_quiet, dtype="bf16")
    to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet)
    ours = load_file(tmp_path / "h" / "model.safetensors")
    theirs = load_file(LLADA / "model.safetensors")
    assert all(torch.equal(ours[name], tensor.bfloat16()) for name, tensor in theirs.items())
    assert json.loads((tmp_path / "h" / "config.json").read_text())["dtype"] == "bfloat16"
    to_hf_directory(tmp_path / "m", tmp_path / "f", progress=_quiet, dtype="fp32")
    assert load_file(tmp_path / "f" / "model.safetensors")[HEAD].dtype == torch.float32


@pytest.mark.parametrize("direction", ["to Megatron", "to Hugging Face"])
def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch, direction):
    """It stops in the second file; the first is not written again, and all is right."""
    source = _sharded(tmp_path / "s", LLADA)
    monkeypatch.setattr(torch_dist, "FILE", 40_000)
    to_megatron_checkpoint(source, tmp_path / "whole", progress=_quiet)
    work = to_megatron_checkpoint if direction == "to Megatron" else to_hf_directory
    start = source if direction == "to Megatron" else tmp_path / "whole"

    def interrupt(done, _total):
        if done > 60_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(start, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    first = sorted(p for p in partial.iterdir() if p.suffix in (".distcp", ".safetensors"))[0]
    stamp = first.stat().st_mtime_ns
    work(start, tmp_path / "out", progress=_quiet)
    assert (tmp_path / "out" / first.name).stat().st_mtime_ns == stamp
    if direction == "to Megatron":
        to_hf_directory(tmp_path / "out", tmp_path / "back", progress=_quiet)
    done = tmp_path / ("back" if direction == "to Megatron" else "out")
    assert _files(done) == _files(source) and not partial.exists()


def _broken(folder, how):
    """Copy the directory and break it; returns what the message must name."""
    shutil.copytree(LLADA, folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return "is cut short: tensor model.transformer"
    if how == "missing shard":
        index = {"weight_map": dict.fromkeys(tensors, "model-2.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return "shard model-2.safetensors is missing (tensor "
    if how == "wrong family":
        config.write_text(json.dumps({**settings, "model_type": "gpt2"}))
        return "model_type='gpt2'; known families are llada"
    if how == "another family's tensors":
        save_file({"lm_head.weight": tensors[HEAD]}, file)
        return "tensor model.transformer.wte.weight is missing"
    if how == "wrong vocabulary":
        config.write_text(json.dumps({**settings, "embedding_size": 192}))
        return "tensor model.transformer.wte.weight has shape [160, 32], and config.json asks"
    if how == "extra tensor":
        save_file({**tensors, "lora.A": torch.zeros(1)}, file)
        return "tensor lora.A would be lost"
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    return "pytorch_model.bin is a pickle"


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "missing shard",
        "wrong family",
        "another family's tensors",
        "wrong vocabulary",
        "extra tensor",
        "pickle",
    ],
)
def test_what_cannot_be_converted_is_named_in_one_line(tmp_path, how):
    said = _broken(tmp_path / "s", how)
    with pytest.raises(ValueError, match=".") as error:
        to_megatron_checkpoint(tmp_path / "s", tmp_path / "m", progress=_quiet)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path / "s") in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["s"], "nothing was written"


def test_an_existing_target_is_left_alone(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(ValueError, match="exists; choose another name"):
        to_megatron_checkpoint(LLADA, tmp_path / "m", progress=_quiet)


def test_a_flipped_byte_is_found_and_named(tmp_path):
    to_megatron_checkpoint(LLADA, tmp_path / "m", progress=_quiet)
    shard = tmp_path / "m" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Damaged, match="__0_0.distcp: damaged"):
        to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet)
    assert not (tmp_path / "h").exists()


class _Harmful:
    def __reduce__(self):
        return (print, ("ran",))


def test_metadata_that_could_run_code_is_refused(tmp_path, capsys):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(ValueError, match="names builtins.print, which is not metadata"):
        read_metadata(tmp_path)
    dotted = b"\x80\x04\x8c+torch.distributed.checkpoint.metadata\x8c\x06os.sep\x93."
    (tmp_path / ".metadata").write_bytes(dotted.replace(b"+", struct.pack("B", 37)))
    with pytest.raises(ValueError, match="not a whole Megatron checkpoint"):
        read_metadata(tmp_path)
    assert capsys.readouterr().out == ""


def test_tensors_are_read_in_blocks(tmp_path, monkeypatch):
    """No more than a block of a large tensor is held: reads of the vocabulary come in parts."""
    monkeypatch.setattr(convert, "BLOCK", 2048)
    to_megatron_checkpoint(LLADA, tmp_path / "m", progress=_quiet)
    weights = MegatronWeights(tmp_path / "m")
    blocks = list(weights.blocks(HEAD))
    assert len(blocks) == 10 and all(block.nbytes == 2048 for block in blocks)
    to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet)
    assert _files(tmp_path / "h") == _files(LLADA)
