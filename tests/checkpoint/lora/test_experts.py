"""Runs that train adapters on experts: resumed at other layouts, merged, exported."""

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.checkpoint.convert import to_hf_directory, to_peft_directory
from agrpo_megatron.checkpoint.lora.merged import AdapterTensors
from agrpo_megatron.checkpoint.start import load_model, load_start_weights
from agrpo_megatron.families.peft import lora_settings_of, read_peft
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.runs.progress import checkpoint_path
from tests.checkpoint.lora.test_runs import FOUR, RUN, _adapters, _rows, _train
from tests.ranks import run_ranks
from tests.training.layouts import write_start
from tests.training.test_expert_layouts import EXPERTS
from tests.training.tiny import open_session

KINDS = ["model.moe.shared_ffn_hidden_size=24", "model.moe.dense_layers=1"]
ALL = "lora.modules=null"  # and the embedding


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    run_ranks(1, write_start, folder, [*EXPERTS, *KINDS])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run_ranks(1, _train, directory, base, [ALL])
    return directory


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((1, []), (2, ["parallel=ep2", "optimizer.distributed=true"])),
        ((2, ["parallel=tp2-sp-etp2", "optimizer.distributed=true"]), (2, ["parallel=ep2"])),
    ],
    ids=["tp1 to ep2", "etp2 to ep2"],
)
def test_adapted_experts_resume_at_another_layout(whole, base, tmp_path, first, then):
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(first[0], _train, tmp_path, base, [ALL, *first[1]], (2, "seal"))
    run_ranks(then[0], _train, tmp_path, base, [ALL, *then[1]])
    theirs, ours = _adapters(whole), _adapters(tmp_path)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * (4 * 4 + 3 + 3 * 3 * (4 + 1)) + 1
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) < 1e-5, name
    moved = [float(theirs[n].abs().max()) > 1e-3 for n in theirs if "lora_B" in n]
    assert sum(moved) > 0.8 * len(moved)  # an expert may get no tokens


def _logits(run_dir, overrides):
    """Return this rank's logits, beside and merged, of which stages without the head have none."""
    fill = load_start_weights if run_dir is None else lambda *_: None
    session, engine = open_session(*overrides, world_size=dist.get_world_size(), fill=fill)
    network, settings = engine.network, session.run.settings
    if run_dir is not None:
        load_model(network, settings, checkpoint_path(run_dir))
    rows = _rows(settings.model)
    found = forward_rows(network, [rows], lambda _, logits: logits.clone())
    if network.adapters is not None and len(found) == network.ranks.pipeline.size:
        network.for_rollouts()
        with torch.no_grad():
            found.append(network.chunks[0](rows))
    return found, network.vocab.start


def test_a_merged_export_has_the_logits_of_adapted_experts(whole, base, tmp_path):
    """Beside the weights, and merged into each rank's part of them, at several layouts."""
    to_hf_directory(checkpoint_path(whole), tmp_path / "hf", progress=lambda *_: None)
    ((expected,), _), ((frozen,), _) = (
        run_ranks(1, _logits, None, [*FOUR, f"model.load={load}"])[0]
        for load in (tmp_path / "hf", base)
    )
    scale = float(expected.abs().max())
    assert float((expected - frozen).abs().max()) > 0.03 * scale
    for size, layout in ((2, "tp2-sp-etp2"), (2, "ep2"), (4, "pp2-ep2")):
        own = [*RUN, ALL, "lora.merge_rollouts=true", f"model.load={base}", f"parallel={layout}"]
        results = run_ranks(size, _logits, whole, own)
        assert sum(len(found) for found, _ in results) == (2 if "pp" in layout else 4)
        for found, start in results:
            for logits in found:
                columns = logits[:, : max(0, expected.shape[1] - start)]
                theirs = expected[:, start : start + columns.shape[1]]
                assert float((columns - theirs).abs().max()) < 1e-5 * scale, layout


def test_adapted_experts_leave_and_come_back_in_pefts_format(whole, tmp_path):
    to_peft_directory(checkpoint_path(whole), tmp_path / "peft", progress=lambda *_: None)
    tensors = AdapterTensors(checkpoint_path(whole))
    lora = lora_settings_of(tmp_path / "peft", tensors.model)
    read = read_peft(tmp_path / "peft", tensors.model, lora)
    assert lora.modules is None and lora.rank == 3
    name = "model.layers.1.mlp.experts.3.down_proj.lora_A.weight"
    assert torch.equal(read(name)[:], tensors.part(name)) and tensors.part(name).any()
