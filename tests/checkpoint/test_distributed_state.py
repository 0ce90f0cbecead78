"""A distributed optimizer is saved and loaded by ranges: as Megatron's own gather, without it."""

import itertools
import math
from functools import partial

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.profiler import ProfilerActivity, profile

from agrpo_megatron.checkpoint import saving
from agrpo_megatron.checkpoint.distributed_state import FORMAT, boxes
from agrpo_megatron.checkpoint.sharded import _model_state, load_checkpoint
from agrpo_megatron.training.sft import run_sft
from tests.checkpoint.test_sharded import DISTRIBUTED, _continue, _open, _same, _save
from tests.ranks import run_ranks

# A range is far larger than a weight, and than what ranks exchange about their blocks.
WIDE = ["model.hidden_size=64", "model.ffn_hidden_size=160", "model.num_layers=6"]
LAYOUTS = {  # ranks, settings
    "dp3": (3, [DISTRIBUTED]),
    "tp2 dp2": (4, [DISTRIBUTED, "parallel.tensor=2"]),
    "pp2 dp2, bf16": (4, [DISTRIBUTED, "parallel.pipeline=2", "precision=bf16"]),
}


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 5), (4, 1, 3)])
def test_boxes_hold_a_range_in_its_order(shape):
    elements = torch.arange(math.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations(range(elements.numel() + 1), 2):
        found = list(boxes(shape, start, stop))
        parts = [
            elements[tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True))]
            for corner, size in found
        ]
        assert torch.cat([p.flatten() for p in parts]).tolist() == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1


def _one_step(overrides):
    """Return an engine whose optimizer has a state."""
    session, engine = _open(overrides)
    run_sft(session, engine, start=3, on_iteration_end=lambda _: None)
    return engine


def _gathered(engine):
    """Return the state of a run with the optimizer's as Megatron's own code gathers it."""
    model = _model_state(engine.network)
    kind = {"distrib_optim_sharding_type": FORMAT}
    optimizer = engine.optimizer.sharded_state_dict(model, metadata=kind)
    return {**model, "optimizer": optimizer, "scheduler": engine.scheduler.state_dict()}


def _save_both(root, overrides):
    """Save by ranges and as Megatron does; return by name whether the stored tensors are equal."""
    engine = _one_step(overrides)
    ours = _save(root / "ours", engine, 2)
    saving.run_state = _gathered
    theirs = _save(root / "theirs", engine, 2)
    names = [dist_checkpointing.load_tensors_metadata(str(path)).keys() for path in (ours, theirs)]
    assert names[0] == names[1]
    stored = [dist_checkpointing.load_plain_tensors(str(path)) for path in (ours, theirs)]
    return {name: torch.equal(stored[0][name], stored[1][name]) for name in names[0]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stored_tensors_are_those_that_megatron_gathers(tmp_path, layout):
    """And each checkpoint is loaded alike at one rank: old ones are Megatron's."""
    ranks, overrides = LAYOUTS[layout]
    equal = run_ranks(ranks, _save_both, tmp_path, overrides)[0]
    assert all(equal.values())
    assert sum(name.startswith("optimizer.state.param.") for name in equal) == 9
    precision = [each for each in overrides if each.startswith("precision")]
    ours, theirs = (
        run_ranks(1, _continue, tmp_path / by / "sft-000002", [DISTRIBUTED, *precision])[0]
        for by in ("ours", "theirs")
    )
    assert _same(ours, theirs)


def _peak(function):
    """Return the most bytes of host memory that torch allocated at a time, and the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)), result


def _measure(root, overrides):
    """Return bytes of this rank: of what it owns, and peaks of a save and of a load."""
    engine = _one_step(overrides)
    own = 3 * 4 * sum(part.numel() for part in engine.optimizer.get_parameters())
    weights = sum(p.nbytes for p in engine.network.chunks[0].parameters())
    saved, path = _peak(partial(_save, root, engine, 2))
    loaded, _ = _peak(partial(load_checkpoint, path, engine))
    written = sum(file.stat().st_size for file in path.glob(f"__{engine.ranks.rank}_*"))
    return own, weights, saved, loaded, written


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_its_share_and_no_more(tmp_path, ranks):
    """A save: also the weights, on the first data-parallel rank.

    A load: also the moments of the optimizer, and gate and up projections, which Megatron joins.
    """
    costs = run_ranks(ranks, _measure, tmp_path, [DISTRIBUTED, *WIDE])
    whole = sum(own for own, *_ in costs)
    for rank, (own, weights, saved, loaded, written) in enumerate(costs):
        share = own + (weights if rank == 0 else 0)
        assert own < 1.1 * whole / ranks
        assert saved < 1.2 * share and loaded < 1.2 * own + own * 2 / 3 + weights / 2
        assert share < written < 1.2 * share
