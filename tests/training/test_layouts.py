"""One supervised and two AGRPO iterations from the same weights: the same at every layout."""

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.training.rl import collect_rollout, update_policy
from tests.ranks import run_ranks
from tests.training.layouts import (
    COMMON,
    DISTRIBUTED,
    RECOMPUTE,
    compare,
    make_start,
    run_at,
    train,
)
from tests.training.tiny import open_session

OVERLAP = [DISTRIBUTED, "ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true"]
# name: ranks, overrides
TABLE = {
    "tp2": (2, []),
    "tp2-sp": (2, []),
    "pp2": (2, []),
    "pp2-vpp2": (2, []),
    "pp4": (4, []),
    "cp2": (2, []),
    "dp2": (2, []),
    "dp2 distributed optimizer": (2, [DISTRIBUTED]),
    "tp2-pp2": (4, []),
    "tp2-dp2": (4, []),
    "pp2-dp2": (4, []),
    "tp2-cp2": (4, []),
}
MORE = {
    "pp2 lockstep": (2, ["rollout.schedule=lockstep"]),
    "pp2 uneven": (2, ["parallel.layers=[1,3]"]),
    "tp2-sp-pp2": (4, []),
    "cp2-pp2": (4, []),
    "dp2 overlapping": (2, OVERLAP),
    "pp2-vpp2-dp2 overlapping": (4, [*OVERLAP, "ddp.align_param_gather=true"]),
    "pp2 recompute": (2, [RECOMPUTE % "recompute_num_layers: 1"]),
    "tp2-sp recompute": (2, ["model.megatron={recompute_granularity: selective}"]),
    "pp2 rollout tp2": (2, ["rollout.parallel=tp2"]),
    "pp4 rollout tp2-pp2": (4, ["rollout.parallel=tp2-pp2"]),
    "tp2-sp rollout dp2": (2, ["rollout.parallel=dp2"]),
}


BLOCK_MODEL = [
    "model.family=sdar",
    "model.attention=block_causal",
    "model.block_length=4",
    "model.qk_norm=true",
]
BLOCK_SAMPLING = ["sampling.block_origin=row", "sampling.unmasking=low_confidence"]
BLOCK_LAYOUTS = {
    "tp2-sp": (2, []),
    "pp2": (2, []),
    "pp2-vpp2 lockstep": (2, ["rollout.schedule=lockstep"]),
    "dp2 distributed optimizer": (2, [DISTRIBUTED]),
    "tp2-pp2 recompute": (4, [RECOMPUTE % "recompute_num_layers: 1"]),
}

TIED_MODEL = ["model.family=qwen3", "model.qk_norm=true", "model.tie_embeddings=true"]
TIED_LAYOUTS = {
    "tp2-sp": (2, []),
    "pp2": (2, []),
    "pp2-vpp2": (2, []),
    "pp2 rollout tp2": (2, ["rollout.parallel=tp2"]),
    "tp2 rollout pp2": (2, ["rollout.parallel=pp2"]),
    "pp2-dp2 distributed optimizer": (4, [DISTRIBUTED]),
}

ADAPTERS = ["lora.rank=3", "lora.alpha=6", "lora.modules=[q_proj,v_proj,attn_out,up_proj,ff_out]"]
ADAPTED_LAYOUTS = {
    "tp2 merged": (2, ["lora.merge_rollouts=true"]),
    "tp2-sp recompute": (2, [RECOMPUTE % "recompute_num_layers: 1"]),
    "pp2 recompute, rollout tp2": (
        2,
        [RECOMPUTE % "recompute_num_layers: 1", "rollout.parallel=tp2"],
    ),
    "pp2-vpp2": (2, []),
    "cp2": (2, []),
    "dp2 distributed optimizer": (2, [DISTRIBUTED]),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_start(tmp_path_factory, [])


@pytest.fixture(scope="module")
def alone(start):
    return run_ranks(1, train, start, [])[0]


@pytest.mark.parametrize("name", [*TABLE, *MORE])
def test_the_layout_changes_nothing(start, alone, name):
    compare(run_at(TABLE | MORE, name, train, start, []), alone)


@pytest.fixture(scope="module")
def block_start(tmp_path_factory):
    return make_start(tmp_path_factory, BLOCK_MODEL)


@pytest.fixture(scope="module")
def block_alone(block_start):
    return run_ranks(1, train, block_start, BLOCK_SAMPLING)[0]


@pytest.mark.parametrize("name", BLOCK_LAYOUTS)
def test_the_layout_changes_nothing_of_a_block_model(block_start, block_alone, name):
    """Rows end after the open block, so their lengths change from step to step."""
    compare(run_at(BLOCK_LAYOUTS, name, train, block_start, BLOCK_SAMPLING), block_alone)


@pytest.fixture(scope="module")
def tied_start(tmp_path_factory):
    return make_start(tmp_path_factory, TIED_MODEL)


@pytest.fixture(scope="module")
def tied_alone(tied_start):
    return run_ranks(1, train, tied_start, [])[0]


@pytest.mark.parametrize("name", TIED_LAYOUTS)
def test_the_layout_changes_nothing_of_a_tied_head(tied_start, tied_alone, name):
    """A pipeline has two copies of the weights, whose gradients are added."""
    compare(run_at(TIED_LAYOUTS, name, train, tied_start, []), tied_alone)
    assert "lm_head.weight" not in tied_alone["weights"]


@pytest.fixture(scope="module")
def adapted_alone(start):
    return run_ranks(1, train, start, ADAPTERS)[0]


@pytest.mark.parametrize("name", ADAPTED_LAYOUTS)
def test_the_layout_changes_nothing_of_adapters(start, adapted_alone, name):
    """Of attention, MLP and the head, which has the name of the MLP's second matrix."""
    compare(run_at(ADAPTED_LAYOUTS, name, train, start, ADAPTERS), adapted_alone)
    names = [name for name in adapted_alone["weights"] if "lora_B" in name]
    assert len(names) == 4 * 5 + 1
    assert min(float(adapted_alone["weights"][name].abs().max()) for name in names) > 1e-3


def test_what_layouts_are_compared_by_is_not_trivial(start, alone):
    """Losses are no rounding, gradients are clipped, and weights and completions change."""
    assert min(map(abs, alone["loss"])) > 1e-2
    assert min(alone["grad_norm"]) > 0.5
    untrained = run_ranks(1, _untrained, start)[0]
    moved = [float((alone["weights"][n] - t).abs().max()) for n, t in untrained.items()]
    assert min(moved) > 1e-3
    first, *later = alone["tokens"]
    assert all((tokens != first).any() for tokens in later)


def _untrained(folder):
    session, engine = open_session(*COMMON, f"model.load={folder}")
    named = {n: p.detach() for n, p in engine.network.named_parameters()}
    return export_hf(named, session.run.settings.model, session.run.ranks)


def _bf16(folder, layout):
    """Return completions, dtypes of weights and of what Adam updates, and whether all is finite."""
    overrides = [*COMMON, f"model.load={folder}", "precision=bf16", f"parallel={layout}"]
    session, engine = open_session(*overrides, world_size=dist.get_world_size())
    rollout, _ = collect_rollout(session, engine, 0)
    metrics, _ = update_policy(session, engine, rollout, None)
    groups = engine.optimizer.param_groups
    return {
        "tokens": rollout.trajectory.tokens,
        "weights": {p.dtype for _, p in engine.network.named_parameters()},
        "main": {p.dtype for group in groups for p in group["params"]},
        "grad_norm": metrics["grad_norm"],
        "ratio error": metrics["ratio/max_error"],
    }


def test_bf16_keeps_float32_main_weights_and_a_ratio_of_one(start):
    (one,) = run_ranks(1, _bf16, start, "tp1")
    for result in (one, *run_ranks(2, _bf16, start, "pp2")):
        assert result["weights"] == {torch.bfloat16} and result["main"] == {torch.float32}
        assert result["ratio error"] < 1e-3
        assert result["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
        assert torch.equal(result["tokens"], one["tokens"])
