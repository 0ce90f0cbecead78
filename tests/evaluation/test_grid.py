"""The grid of an evaluation: every cell is one that the sampler can run."""

import pytest

from agrpo_megatron.config.rules import validate_sampling
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.evaluation.grid import Cell, cell_sampling, evaluation_grid, sweep_steps


def grid(*overrides, is_sweep=False):
    """Return the cells as (length, steps)."""
    settings = load(Settings, None, overrides)
    cells = evaluation_grid(settings, is_sweep=is_sweep)
    for cell in cells:
        validate_sampling(cell_sampling(settings, cell), "evaluation")
    return [(cell.completion_length, cell.denoising_steps) for cell in cells]


def test_without_a_grid_there_is_the_one_cell_of_a_run():
    assert grid() == [(256, 128)]
    assert grid("evaluation.denoising_steps=64") == [(256, 64)]


def test_the_published_protocol_of_d1():
    lengths = "evaluation.completion_lengths=[512,128,256]"
    assert grid(lengths, "evaluation.tokens_per_step=[2]") == [(128, 64), (256, 128), (512, 256)]


def test_every_length_meets_every_number_of_steps_once():
    cells = grid("evaluation.completion_lengths=[128,256]", "evaluation.steps=[128,16,16]")
    assert cells == [(128, 16), (128, 128), (256, 16), (256, 128)]


def test_a_sweep_halves_from_one_token_a_step_to_one_step_a_block():
    assert grid(is_sweep=True) == [(256, steps) for steps in (8, 16, 32, 64, 128, 256)]
    chosen = grid("evaluation.steps=[64]", is_sweep=True)
    assert chosen == [(256, 64)], "steps that are set are kept"


@pytest.mark.parametrize("block", range(1, 65))
@pytest.mark.parametrize("blocks", [1, 3])
def test_sweeps_reach_both_ends_in_at_least_five_points_where_there_are_as_many(block, blocks):
    steps = sweep_steps(block * blocks, block)
    assert steps == sorted(set(steps)) and (steps[0], steps[-1]) == (blocks, block * blocks)
    assert all(count % blocks == 0 for count in steps)
    assert len(steps) >= min(5, block)


def test_dream_decodes_every_length_as_one_block():
    dream = ["sampling.schedule=dream", "sampling.block_length=256", "evaluation.steps=[100]"]
    assert grid(*dream, "evaluation.completion_lengths=[64,300]") == [(64, 100), (300, 100)]


def test_a_cell_changes_length_and_steps_alone():
    settings = load(Settings, None, ["evaluation.top_k=5"])
    sampling, base = cell_sampling(settings, Cell(64, 32)), settings.evaluation_sampling
    changed = {name for name, value in vars(base).items() if vars(sampling)[name] != value}
    assert changed == {"completion_length", "denoising_steps"}


def test_greedy_samples_are_refused_where_nothing_is_drawn():
    for order in ("low_confidence", "leftmost"):
        with pytest.raises(ValueError, match="evaluation.temperature=0 writes the same one each"):
            grid("evaluation.samples=2", f"evaluation.unmasking={order}")
    assert grid("evaluation.samples=2", "evaluation.temperature=0.5") == [(256, 128)]
    assert grid("evaluation.samples=2", "evaluation.unmasking=random") == [(256, 128)]


@pytest.mark.parametrize("schedule", ["uniform", "dream"])
def test_a_length_below_1_is_refused(schedule):
    options = [f"sampling.schedule={schedule}", "sampling.block_length=256"]
    said = "evaluation.completion_lengths=0 is below 1; use for example 256"
    with pytest.raises(ValueError, match=said):
        grid(*options, "evaluation.completion_lengths=[0]")
