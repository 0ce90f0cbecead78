"""Sharded checkpoints: bit-exact continuation, any layout, whole or not there at all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.checkpoint.saving import Saver
from agrpo_megatron.checkpoint.sharded import load_checkpoint, load_weights
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.network import Network, build_network
from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.rollout.session import Session
from agrpo_megatron.runs.progress import Progress, latest_checkpoint
from agrpo_megatron.training.sft import run_sft
from tests.ranks import run_ranks
from tests.training.tiny import open_session

# A warm-up and a decay, so that the schedule's place matters; Adam's moments matter anyway.
SFT = [
    "sft.iterations=4",
    "sft.optimizer.learning_rate=1e-2",
    "sft.optimizer.decay=cosine",
    "sft.optimizer.warmup_iterations=2",
]
TP2, DISTRIBUTED = "parallel.tensor=2", "sft.optimizer.distributed=true"


def _open(overrides: list[str]) -> tuple[Session, Engine]:
    return open_session(*SFT, *overrides, world_size=dist.get_world_size(), phase="sft")


def _weights(session, network):
    weights = {name: p.detach() for name, p in network.named_parameters()}
    return export_hf(weights, session.run.settings.model, session.run.ranks)


def _outcome(session, engine):
    """Return what two runs are compared by: metrics without times, and weights."""
    keys = ("loss", "grad_norm", "learning_rate", "scored_tokens")
    records = [{key: record[key] for key in keys} for record in session.output.log.records]
    return records, _weights(session, engine.network)


def _save(root, engine, iteration, keep=9):
    return _saver(root, engine, keep).save(Progress("sft", iteration, {}))


def _saver(root, engine, keep):
    return Saver(Path(root), engine, keep=keep, is_async=False, files=None)


def _train_and_save_halfway(root, overrides):
    """Train four iterations, saving after two and at the end; returns records 3, 4 and weights."""
    session, engine = _open(overrides)
    run_sft(
        session,
        engine,
        start=0,
        on_iteration_end=lambda i: _save(root, engine, i) if i in (2, 4) else None,
    )
    records, weights = _outcome(session, engine)
    return records[2:], weights


def _load_and_save(source, root, overrides):
    """Load at this layout and save again, with no step in between."""
    _, engine = _open(overrides)
    load_checkpoint(Path(source), engine)
    return _save(root, engine, 2)


def _continue(source, overrides):
    session, engine = _open([*overrides, "run.seed=0", "model.init_std=0.1"])
    load_checkpoint(Path(source), engine)
    run_sft(session, engine, start=2, on_iteration_end=lambda _: None)
    return _outcome(session, engine)


def _same(ours, theirs):
    """Say whether two outcomes agree bit for bit."""
    (records, weights), (other_records, other_weights) = ours, theirs
    return records == other_records and all(
        torch.equal(weights[name], tensor) for name, tensor in other_weights.items()
    )


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(1, []), (2, [TP2]), (2, [DISTRIBUTED]), (1, [DISTRIBUTED])],
    ids=["one rank", "tp2", "dp2, distributed optimizer", "distributed optimizer alone"],
)
def test_a_loaded_run_continues_bit_for_bit(tmp_path, world_size, overrides):
    whole = run_ranks(world_size, _train_and_save_halfway, tmp_path, overrides)
    again = run_ranks(world_size, _continue, tmp_path / "sft-000002", overrides)
    assert len(whole[0][0]) == 2
    assert all(_same(a, b) for a, b in zip(again, whole, strict=True))


def _weights_alone(source, overrides):
    """Load the weights without an optimizer, as evaluation does."""
    session, engine = _open([*overrides, "run.seed=5"])
    network = build_network(session.run.settings, session.run.ranks)
    load_weights(Path(source), network)
    return _weights(session, network)


@pytest.mark.parametrize(
    ("overrides", "other"),
    [([], [TP2]), ([DISTRIBUTED], [DISTRIBUTED])],
    ids=["tp1 to tp2", "dp1 to dp2, distributed optimizer"],
)
def test_a_checkpoint_goes_to_another_layout_and_back_bit_for_bit(tmp_path, overrides, other):
    """Loading at the other layout and saving there changes nothing; training there, rounding."""
    whole = run_ranks(1, _train_and_save_halfway, tmp_path / "a", overrides)[0]
    source = tmp_path / "a" / "sft-000002"
    run_ranks(2, _load_and_save, source, tmp_path / "b", other)
    back = run_ranks(1, _continue, tmp_path / "b" / "sft-000002", overrides)[0]
    assert _same(back, whole)
    records, weights = run_ranks(2, _continue, source, other)[0]
    for ours, theirs in zip(records, whole[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    worst = max(float((weights[name] - t).abs().max()) for name, t in whole[1].items())
    assert worst < 1e-4
    for alone in run_ranks(2, _weights_alone, tmp_path / "a" / "sft-000004", other):
        assert all(torch.equal(alone[name], tensor) for name, tensor in whole[1].items())


def _kill_saves(root):
    """Fail in each stage of a save; return (stage, latest, entries) after each, then a good one."""
    from agrpo_megatron.checkpoint import saving

    root = Path(root)
    session, engine = _open(["sft.iterations=1"])
    run_sft(session, engine, start=0, on_iteration_end=lambda i: _save(root, engine, i))
    seen = []

    def look(stage):
        found = latest_checkpoint(root)
        assert found is not None
        names = [p.name.rpartition("-")[0] if p.name[0] == "." else p.name for p in root.iterdir()]
        pointed = (root / "latest").read_text()
        seen.append((stage, pointed, found[1].iteration, sorted(names)))

    def die(*_args, **_kwargs):
        raise KeyboardInterrupt

    def write_half(_own, folder, *_args):
        Path(folder, "half.distcp").write_bytes(b"half")
        die()

    stages = [
        ("writing", saving, "_write", write_half),
        ("naming", Path, "rename", die),
        ("pointing", saving, "point", die),
    ]
    for stage, owner, name, stand_in in stages:
        own = getattr(owner, name)
        setattr(owner, name, stand_in)
        with pytest.raises(KeyboardInterrupt):
            _save(root, engine, 2)
        setattr(owner, name, own)
        look(stage)
    _save(root, engine, 2)
    look("whole")
    load_checkpoint(root / "sft-000002", engine)
    return seen


def test_a_killed_save_leaves_the_previous_checkpoint_in_place(tmp_path):
    seen = run_ranks(1, _kill_saves, tmp_path)[0]
    assert seen == [
        ("writing", "sft-000001", 1, [".partial-sft-000002", "latest", "sft-000001"]),
        ("naming", "sft-000001", 1, [".partial-sft-000002", "latest", "sft-000001"]),
        ("pointing", "sft-000001", 1, ["latest", "sft-000001", "sft-000002"]),
        ("whole", "sft-000002", 2, ["latest", "sft-000001", "sft-000002"]),
    ]


def _save_many(root):
    root = Path(root)
    _, engine = _open([])
    for phase, iterations in (("sft", (5, 10)), ("rl", (9, 10, 11))):
        for iteration in iterations:
            _saver(root, engine, 2).save(Progress(phase, iteration, {}))
    return sorted(path.name for path in root.iterdir())


def test_the_newest_checkpoints_of_a_phase_stay_and_the_supervised_ones_too(tmp_path):
    kept = run_ranks(1, _save_many, tmp_path)[0]
    assert kept == ["latest", "rl-000010", "rl-000011", "sft-000005", "sft-000010"]


def _read_with_megatron_alone(root):
    """Save, then list and load the tensors, also into Megatron's own GPTModel."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    session, engine = _open([])
    path = _save(root, engine, 1)
    listed = dist_checkpointing.load_tensors_metadata(str(path))
    plain = dist_checkpointing.load_plain_tensors(str(path))
    assert listed.keys() <= plain.keys()
    embedding = engine.network.chunks[0].embedding.word_embeddings.weight
    assert torch.equal(plain["embedding.word_embeddings.weight"], embedding)
    model = session.run.settings.model
    theirs = GPTModel(
        config=engine.network.config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_sequence_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    load_weights(path, Network((theirs,), engine.ranks, engine.network.vocab))  # type: ignore
    weights = dict(theirs.named_parameters())
    equal = {name: torch.equal(p, weights[name]) for name, p in engine.network.named_parameters()}
    return sorted(n for n in listed if n.endswith("weight") and "optimizer" not in n), equal


def test_megatron_alone_lists_and_loads_the_model(tmp_path):
    names, equal = run_ranks(1, _read_with_megatron_alone, tmp_path)[0]
    assert names == [
        "decoder.final_layernorm.weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.mlp.linear_fc1.weight",
        "decoder.layers.mlp.linear_fc2.weight",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    ]
    assert len(equal) == 15 and all(equal.values())
