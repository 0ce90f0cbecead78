"""tools/accuracy_compute.py: its grid, numbers from written logs, finished runs."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from tests.ranks import _fork_server

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
import accuracy_compute  # noqa: E402
from accuracy_plan import plan, read_grid  # noqa: E402
from accuracy_points import at_flops, read_reached, read_sizes, table_rows  # noqa: E402

EXAMPLE = ROOT / "examples" / "scaling" / "accuracy.yaml"
MICRO = """
task: {name: TASK, train_problems: 32, eval_problems: 8}
model: {num_layers: 1, hidden_size: 16, ffn_hidden_size: 32, num_attention_heads: 2,
  max_sequence_length: 32, init_std: 0.25}
sampling: {completion_length: 6, block_length: 6, denoising_steps: 3}
sft: {batch_size: 8}
algorithm: {prompts_per_iteration: 4, group_size: 4}
train: {iterations: 2}
evaluation: {interval: 1}
""".replace("TASK", str(ROOT / "examples" / "my_task.py"))
GRID = """
seeds: [0, 1]
sizes: {one: {model.hidden_size: 16}}
supervised: [2, 8]
starts: [2]
budgets: [1, 2]
"""


@pytest.fixture
def files(tmp_path):
    """Return the paths of a micro settings file and its grid."""
    settings, grid = tmp_path / "micro.yaml", tmp_path / "grid.yaml"
    settings.write_text(MICRO)
    grid.write_text(GRID)
    return settings, grid


def _write(directory, accuracies, flops=()):
    """Write the log of a run: its evaluations from before RL on, and the FLOPs of RL."""
    directory.mkdir(parents=True)
    rows = [{"phase": "rl", "iteration": n, "flops": f} for n, f in enumerate(flops, start=1)]
    rows += [
        {"phase": "eval", "iteration": n, "accuracy": share} for n, share in enumerate(accuracies)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_example_has_three_sizes_phases_and_seeds():
    grid = read_grid(accuracy_compute.GRID)
    lines = plan(EXAMPLE, grid, [], Path("runs/accuracy"))
    jobs = [job for line in lines for job in line.jobs]
    assert min(len(grid.sizes), len(grid.starts), len(grid.seeds), len(grid.budgets)) >= 3
    assert len({job.directory for job in jobs}) == len(jobs) == 3 * 5 * 3
    for line in lines:
        settings = line.jobs[1].settings
        assert settings.run.seed == grid.seeds[1] and settings.sft.iterations == line.supervised
        assert bool(settings.train.iterations) == line.has_rl == (line.supervised in grid.starts)
        assert settings.optimizer.decay == "constant", "a short budget begins a longer one"
    sizes = {line.size: line.jobs[0].settings.model.hidden_size for line in lines}
    assert load(Settings, EXAMPLE, []).model.hidden_size == sizes["medium"]
    assert sizes["small"] < sizes["medium"] < sizes["large"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("starts: [2]", "starts: [3]", "has 3, which is not among supervised="),
        (
            "supervised: [2, 8]",
            "supervised: [8, 2]",
            "must be 2 or more whole numbers from 1, ascending",
        ),
        ("seeds: [0, 1]", "seeds: [0]", r"seeds=\[0\] must be 2 or more"),
        ("starts: [2]", "starts: 2", "starts=2 must be"),
        ("supervised: [2, 8]", "supervised: [0, 2]", "whole numbers from 1"),
        ("{model.hidden_size: 16}", "16", "must be settings by the name of a size"),
        ("budgets", "lengths", "budgets is missing or unknown"),
        ("budgets: [1, 2]", "budgets: [1, 3]", "train.iterations=2 is less than the largest"),
        ("budgets: [1, 2]", "budgets: [1.5, 2]", r"budgets=\[1.5, 2\] must be 1 or more"),
    ],
)
def test_a_wrong_grid_is_refused(files, old, new, said):
    settings, path = files
    path.write_text(GRID.replace(old, new))
    with pytest.raises(ValueError, match=said):
        plan(settings, read_grid(path), [], path.parent)


def test_accuracy_between_two_phases_is_linear_in_the_logarithm_of_their_flops():
    points = [(4e9, 0.5), (1e9, 0.1)]
    assert at_flops(points, 2e9) == pytest.approx(0.3)
    assert at_flops(points, 4e9) == 0.5
    assert at_flops(points, 4.1e9) is None and at_flops(points, 0.9e9) is None


def test_flops_are_those_of_training_up_to_an_evaluation(tmp_path):
    _write(tmp_path / "run", (0.25, 0.5, 0.75), (1000, 3000))
    found = read_reached(tmp_path / "run", supervised=500)
    assert found == {0: (500, 0.25), 1: (1500, 0.5), 2: (4500, 0.75)}


def _trained(files, folder):
    """Write finished logs of all runs: the second seed is 20 points ahead in each."""
    grid = read_grid(files[1])
    lines = plan(files[0], grid, [], folder)
    for seed, offset in enumerate((0.0, 0.2)):
        short, long = (line.jobs[seed].directory for line in lines)
        _write(short, (0.1 + offset, 0.3 + offset, 0.7 + offset), (1, 10**12))
        _write(long, (0.5 + offset,))
    return lines, grid


def test_gains_over_a_longer_phase_are_paired_by_seed(files, tmp_path):
    lines, grid = _trained(files, tmp_path)
    (size,) = read_sizes(lines, grid)
    first, second = size.alone[2], size.alone[8]
    assert second.flops == 4 * first.flops > 0
    assert [*first.accuracies.values()] == pytest.approx([0.1, 0.3])
    assert [*second.accuracies.values()] == pytest.approx([0.5, 0.7])
    before, one, two = size.curves[2]
    assert before.gain is None, "it is the supervised phase itself"
    assert one.gain is not None and one.flops == first.flops + 1
    # A FLOP more than the short phase: both seeds gain 0.2, so the band has no width.
    assert (one.gain.mean, one.gain.low, one.gain.high) == pytest.approx((0.2, 0.2, 0.2), abs=1e-5)
    assert two.gain is None and math.isclose(two.flops, first.flops + 1 + 1e12)
    rows = table_rows([size], grid.budgets)
    assert [(row["supervised"], row["RL"]) for row in rows] == [
        ("2", "0"),
        ("8", "0"),
        ("2", "1"),
        ("2", "2"),
    ]
    assert rows[2]["less SFT alone, points (95 %)"] == "+20.0 (+20.0 to +20.0)"


def test_finished_runs_are_drawn_and_nothing_is_trained(files, tmp_path, capsys):
    _trained(files, tmp_path)
    words = [str(files[0]), "--grid", str(files[1]), "--output", str(tmp_path)]
    figure = tmp_path / "figure.png"
    assert accuracy_compute.main([*words, "--draw", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| one, ") == 4 and printed.endswith(f"figure {figure}\n")
    assert "| 8 | 0 | " in printed and "| 60.0% (50, 70) |" in printed
    assert figure.stat().st_size > 5000


def test_a_run_that_is_not_finished_has_no_point(files):
    grid = read_grid(files[1])
    lines = plan(files[0], grid, [], files[0].parent)
    for job in lines[0].jobs:
        _write(job.directory, (0.1, 0.3), (1, 1))  # no evaluation after the second iteration
    for job in lines[1].jobs:
        _write(job.directory, (0.5,))
    with pytest.raises(ValueError, match="one: fewer than two supervised phases"):
        read_sizes(lines, grid)


def test_a_finished_run_is_taken_as_it_is(files, capfd):
    """A phase without RL ends with its evaluation, which no checkpoint has."""
    _fork_server()  # the tool's processes come from the server of the other tests
    line = plan(files[0], read_grid(files[1]), [], files[0].parent)[1]
    alone = replace(line, jobs=line.jobs[:1])
    assert accuracy_compute.train_all([alone], workers=1) == []
    log = alone.jobs[0].directory / "metrics.jsonl"
    written = log.read_text()
    assert written.count('"phase": "sft"') == 8 and written.count('"phase": "eval"') == 1
    capfd.readouterr()
    assert accuracy_compute.train_all([alone], workers=1) == []
    assert capfd.readouterr().out.endswith("seed-0 found\n")
    assert log.read_text() == written
