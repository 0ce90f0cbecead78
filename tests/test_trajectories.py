"""A record's dataclass is the only list of its fields: a new one needs no change anywhere else."""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.sampler_state import RECORDED
from agrpo_megatron.rollout import cache
from agrpo_megatron.trajectories import concatenate, join, map_tensors, select, tensors
from agrpo_megatron.types import Trajectory

C = 3  # completion tokens


@dataclass(frozen=True)
class Wider(Trajectory):
    """A trajectory with one field more."""

    margins: Tensor | None = None  # [R, C]


def _trajectory(first, rows, support=None, edits=None):
    ids = torch.arange(first, first + rows)
    grid = ids[:, None] * 10 + torch.arange(C)
    return Wider(
        prompts=tuple(torch.full((1 + number % 2,), number) for number in ids.tolist()),
        tokens=grid,
        unmask_step=grid + 1,
        logprobs=-grid.float(),
        entropies=grid.float() / 2,
        spreads=grid.float() / 4,
        support_ids=None if support is None else grid[..., None].repeat(1, 1, support).int(),
        num_steps=ids + 2,
        rollout_ids=ids,
        sampling=SamplingSettings(),
        margins=grid.float() * 3,
        **_edits(ids, edits),
    )


def _edits(ids, most):
    """Return the fields of edits; rollout `n` has `n` of them, at most `most`."""
    if most is None:
        return {}
    places = torch.arange(most).expand(len(ids), -1)
    table = places.masked_fill(places >= ids[:, None], -1)
    names = ("step", "position", "old", "new")
    values = {f"edit_{name}": table.clone() for name in names} | {"edit_logprob": table.float()}
    return values | {"edit_support_ids": table[..., None].repeat(1, 1, 2).int()}


def test_a_new_field_is_joined_selected_and_changed():
    parts = [_trajectory(0, 2), _trajectory(2, 3)]
    joined = select(join(parts), torch.tensor([4, 0, 2]))
    for name, tensor in tensors(joined).items():
        both = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(tensor, both[[4, 0, 2]]), name
    assert "margins" in tensors(joined) and joined.rollout_ids.tolist() == [4, 0, 2]
    assert [prompt.tolist() for prompt in joined.prompts] == [[4], [0], [2]]
    assert select(joined, torch.tensor([1])).margins.tolist() == [[0.0, 3.0, 6.0]]
    assert map_tensors(joined, lambda t: t + 1).margins.equal(joined.margins + 1)


def test_supports_are_padded_to_the_widest_and_a_part_may_have_none():
    joined = concatenate([_trajectory(0, 1, 2), _trajectory(1, 1), _trajectory(2, 1, 4)])
    assert joined.support_ids.dtype == torch.int32
    assert joined.support_ids[:, 0].tolist() == [[0, 0, -1, -1], [-1] * 4, [20] * 4]


def test_edits_are_padded_to_the_most_of_a_rollout():
    joined = concatenate([_trajectory(0, 1, edits=0), _trajectory(2, 2, edits=3)])
    assert joined.edit_step.tolist() == [[-1, -1, -1], [0, 1, -1], [0, 1, 2]]
    assert joined.edit_support_ids.shape == (3, 3, 2)
    assert (joined.edit_support_ids[..., 0] == joined.edit_step).all()


@pytest.mark.parametrize(
    ("support", "edits"), [(None, None), (2, None), (None, 3), (2, 8), (None, 0)]
)
def test_a_new_field_is_stored_and_read(monkeypatch, tmp_path, support, edits):
    monkeypatch.setattr(cache, "Trajectory", Wider)
    monkeypatch.setattr(cache, "gather_objects", lambda mine: [mine])
    ranks = SimpleNamespace(is_main=True, speaks_for_replica=True, device="cpu")
    ours, other = (cache.RolloutCache(tmp_path, ranks, run=run) for run in ("this", "other"))
    written = replace(_trajectory(5, 3, support, edits), weights_version=7)
    ids, sampling = written.rollout_ids, written.sampling
    ours.writer("x", ranks).add(written)
    found = ours.find_completions("x", ids, sampling=sampling)
    assert found is not None and found.weights_version == 7
    assert tensors(found).keys() == tensors(written).keys()
    assert all(torch.equal(tensor, tensors(found)[n]) for n, tensor in tensors(written).items())
    assert all(map(torch.equal, found.prompts, written.prompts))
    assert other.find_completions("x", ids, sampling=sampling) is None


def test_what_is_recorded_of_a_draw_follows_from_the_two_records():
    assert RECORDED == ("logprobs", "entropies", "spreads")
    assert set(RECORDED) < {field.name for field in fields(Trajectory)}
