"""Runs that train adapters: small checkpoints, any layout, merged and unmerged."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.checkpoint.convert import to_hf_directory, to_peft_directory
from agrpo_megatron.checkpoint.lora.merged import AdapterTensors
from agrpo_megatron.checkpoint.start import load_model, load_start_weights
from agrpo_megatron.checkpoint.weights import MegatronWeights, open_weights
from agrpo_megatron.diffusion.packing import pack
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.runs.directory import resolve_run
from agrpo_megatron.runs.progress import checkpoint_path
from agrpo_megatron.text.tokenizer import CHARACTERS
from agrpo_megatron.training.run import train
from tests.megatron.lora.whole import random_adapters
from tests.ranks import run_ranks
from tests.training.kills import kill_in_save
from tests.training.layouts import FOUR_LAYERS, write_start
from tests.training.test_run import read
from tests.training.tiny import (
    HashedReward,
    open_session,
    resolved_run,
    same_metrics,
    silent_view,
    tiny,
)

FOUR = [FOUR_LAYERS, f"tokenizer.path={CHARACTERS}"]
RUN = [
    *FOUR,
    "lora.rank=3",
    "lora.alpha=6",
    "lora.modules=[q_proj,k_proj,v_proj,attn_out,ff_proj,up_proj,ff_out]",  # and the head
    "lora.train_embedding=true",
    "train.iterations=4",
    "evaluation.interval=2",
    "checkpoint.interval=2",
    "checkpoint.keep=9",
    "algorithm.baseline=none",
    "optimizer.megatron.adam_eps=1e-4",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    run_ranks(1, write_start, folder, [])
    return folder


def _train(run_dir, base, overrides, save=None):
    if save is not None:
        kill_in_save(*save)
    settings = tiny(f"run.dir={run_dir}", *RUN, f"model.load={base}", *overrides)
    resolved = resolve_run(settings, world_size=dist.get_world_size())
    train(replace(resolved, task=HashedReward(resolved.task)), silent_view())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run_ranks(1, _train, directory, base, [])
    return directory


def test_a_checkpoint_holds_what_is_trained_and_names_its_base(whole, base):
    """Also the embedding, which is trained whole; every other weight is the base's."""
    checkpoint = checkpoint_path(whole)
    tensors = AdapterTensors(checkpoint)
    stored = tensors._checkpoint.tensors()
    kinds = {name.partition(".")[0] for name in stored}
    assert kinds == {"adapters", "embedding", "optimizer"}
    count = 2 * (7 * 4 + 1)  # matrices of seven layers in four blocks, and of the head
    assert sum(name.startswith("adapters.") for name in stored) == count
    moments = [n for n in stored if n.startswith("optimizer.state.exp_avg.")]
    assert len(moments) == count + 1
    named = json.loads((checkpoint / "base.json").read_text())
    assert named["load"] == str(base) and len(named["digest"]) == 64
    with pytest.raises(ValueError, match="is missing"):
        MegatronWeights(checkpoint)


def _adapters(run_dir):
    tensors = AdapterTensors(checkpoint_path(run_dir))
    names = [f"{layer.name}.lora_{m}.weight" for layer in tensors.layers for m in "AB"]
    return {name: tensors.part(name) for name in names} | tensors.whole


def test_a_killed_run_resumes_to_the_same_bits(whole, base, tmp_path):
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path, base, [], (2, "seal"))
    run_ranks(1, _train, tmp_path, base, [])
    assert same_metrics(read(tmp_path / "metrics.jsonl"), read(whole / "metrics.jsonl"))
    ours, theirs = _adapters(tmp_path), _adapters(whole)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_run_resumes_when_its_base_trained_on_and_its_first_adapters_are_gone(whole, tmp_path):
    """Adapters name the checkpoint that they were trained on, and are not read from PEFT again."""
    folder, adapters = tmp_path / "base", tmp_path / "peft"
    longer = [*FOUR, "sft.iterations=2", "checkpoint.interval=1", "checkpoint.keep=9"]
    to_peft_directory(checkpoint_path(whole), adapters, progress=lambda *_: None)
    run_ranks(1, _train_all, folder, [*longer, "train.iterations=0"])
    (folder / "checkpoints" / "latest").write_text("sft-000001")
    own = [f"lora.load={adapters}"]
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", folder, own, (2, "seal"))
    (folder / "checkpoints" / "latest").write_text("sft-000002")
    shutil.rmtree(adapters)
    run_ranks(1, _train, tmp_path / "run", folder, own)
    checkpoint = checkpoint_path(tmp_path / "run")
    assert checkpoint.name == "rl-000004"
    named = json.loads((checkpoint / "base.json").read_text())
    assert Path(named["load"]) == folder / "checkpoints" / "sft-000001"


def _train_all(run_dir, overrides):
    train(resolved_run(run_dir, *overrides), silent_view())


def test_a_run_resumes_at_another_layout(whole, base, tmp_path):
    """Two iterations at tp2, two at pp2 with the optimizer's states shared."""
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(2, _train, tmp_path, base, ["parallel=tp2"], (2, "seal"))
    run_ranks(2, _train, tmp_path, base, ["parallel=pp2", "optimizer.distributed=true"])
    theirs = _adapters(whole)
    for name, ours in _adapters(tmp_path).items():
        assert float((ours - theirs[name]).abs().max()) < 1e-5, name
    moved = [float(theirs[n].abs().max()) for n in theirs if "lora_B" in n]
    assert min(moved) > 1e-3


def test_a_run_on_another_base_is_refused(whole, base, tmp_path):
    other = tmp_path / "base"
    other.mkdir()
    run_ranks(1, write_start, other, ["run.seed=1"])
    checkpoint = checkpoint_path(whole)
    with pytest.raises(ValueError, match="its adapters were trained on .* the base is now "):
        to_hf_directory(checkpoint, tmp_path / "hf", progress=lambda *_: None, base=other)
    assert not (tmp_path / "hf").exists()


def _rows(model):
    generator = torch.Generator().manual_seed(5)
    canvas = torch.randint(0, model.vocab_size, (3, 11), generator=generator)
    return pack(canvas, torch.tensor([11, 7, 9]), torch.ones(3, 11, dtype=torch.bool))


def _hash(network):
    named = {n: p for n, p in network.named_parameters() if not n.startswith("adapters.")}
    return {n: hashlib.sha256(p.detach().numpy().tobytes()).digest() for n, p in named.items()}


def _logits(run_dir, base, exported):
    """Return logits beside, merged, unmerged, exported, without adapters, and whether bytes stay.

    `load_model` fills the first network as evaluations do.
    """
    checkpoint = checkpoint_path(Path(run_dir))
    own = [*RUN, f"model.load={base}", "lora.merge_rollouts=true"]
    parallel = f"parallel.tensor={dist.get_world_size()}"
    session, engine = open_session(*own, parallel, world_size=dist.get_world_size())
    network, settings = engine.network, session.run.settings
    load_model(network, settings, checkpoint)
    random_adapters(network)
    rows, before = _rows(settings.model), _hash(network)

    def score(network):
        (logits,) = forward_rows(network, [rows], lambda _, logits: logits.clone())
        return logits[:, : max(0, settings.model.vocab_size - network.vocab.start)]

    found = {"beside": score(network)}
    network.adapters.for_rollouts()
    merged = _hash(network)
    with torch.no_grad():
        found["merged"] = network.chunks[0](rows)[:, : found["beside"].shape[1]]
    found["unmerged"] = score(network)
    changed = sum(merged[name] != before[name] for name in merged)
    return found, changed, _hash(network) == before


@pytest.mark.parametrize("size", [1, 2])
def test_merging_changes_rounding_alone_and_is_undone_bit_for_bit(whole, base, size):
    for found, changed, is_undone in run_ranks(size, _logits, whole, base, None):
        assert is_undone and changed == 4 * 4 + 1  # fused matrices of four layers, and the head
        assert torch.equal(found["unmerged"], found["beside"])
        scale = float(found["beside"].abs().max())
        assert float((found["merged"] - found["beside"]).abs().max()) < 1e-5 * scale


def _exported_logits(run_dir, base, exported, other):
    """Return logits with adapters on, and of the exports, each in a network of its own."""
    checkpoint = checkpoint_path(Path(run_dir))
    session, engine = open_session(*RUN, f"model.load={base}")
    load_model(engine.network, session.run.settings, checkpoint)
    found = []
    networks = [engine.network]
    for load in (exported, other):  # a Hugging Face directory; the run, merged when it is loaded
        plain = [*FOUR, f"model.load={load}"]
        networks.append(open_session(*plain, fill=load_start_weights)[1].network)
    rows = _rows(session.run.settings.model)
    for network in networks:
        found += forward_rows(network, [rows], lambda _, logits: logits.clone())
    return found


def test_a_merged_export_has_the_logits_of_the_adapters(whole, base, tmp_path):
    exported = tmp_path / "hf"
    to_hf_directory(checkpoint_path(whole), exported, progress=lambda *_: None)
    own, *others = run_ranks(1, _exported_logits, whole, base, exported, whole)[0]
    for logits in others:
        assert float((logits - own).abs().max()) < 1e-5
    (_, start), (_, trained) = open_weights(base), open_weights(exported)
    changed = [n for n in start.tensors if not torch.equal(start.part(n)[:], trained.part(n)[:])]
    assert len(changed) == 7 * 4 + 2  # adapted layers, head and embedding
