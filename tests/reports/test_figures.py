"""Figures are drawn for whatever a run has, and touch no global state."""

import io
import random

import matplotlib
import pytest
from PIL import Image

from agrpo_megatron.reports.plots.compare import write_comparison
from agrpo_megatron.reports.plots.figures import draw_figures
from agrpo_megatron.reports.plots.style import spread
from agrpo_megatron.reports.plots.timeline import shown_iterations
from agrpo_megatron.reports.read import read_run
from tests.reports.synthetic import rl_row, sft_row, write_lines, write_run


def test_figures_of_a_finished_run(tmp_path):
    before = dict(matplotlib.rcParams)
    pictures = draw_figures(read_run(write_run(tmp_path)))
    assert list(pictures) == ["learning", "policy", "sampler", "time"]
    for png in pictures.values():
        image = Image.open(io.BytesIO(png))
        assert image.width == 2200
        assert len(set(image.convert("RGB").resize((275, 120)).tobytes())) > 100  # not blank
    assert dict(matplotlib.rcParams) == before


def test_figures_of_runs_that_lack_most_metrics(tmp_path):
    rng = random.Random(0)
    write_lines(tmp_path / "metrics.jsonl", [sft_row(rng, 1, 10)])
    assert list(draw_figures(read_run(tmp_path))) == ["learning"]  # all time is of one part
    row = rl_row(rng, 1, 10) | {"ratio/max_error": 0.0, "ratio/mean": 1.0, "entropy": None}
    write_lines(tmp_path / "metrics.jsonl", [row])
    assert len(draw_figures(read_run(tmp_path))) == 4
    write_lines(tmp_path / "metrics.jsonl", [{"phase": "rl", "iteration": 1}])
    assert draw_figures(read_run(tmp_path)) == {}


def test_a_timeline_shows_the_last_iterations_but_the_closing_one(tmp_path):
    run = write_run(tmp_path, iterations=6)

    def line(iteration, begin):
        own = [["rollout", begin, begin + 2], ["update", begin + 2, begin + 3]]
        own += [["scoring", begin + 2, begin + 2.4], ["grading", begin + 1, begin + 2.5]]
        own += [["of another version", begin, begin + 1]]
        return {"phase": "rl", "iteration": iteration, "ranks": {"0": own, "1": own}}

    # Attempt 1 reached iteration 5; attempt 2 resumed after 3. Iteration 7 has no metrics yet.
    lines = [line(n, 10.0 * n) for n in (1, 2, 3, 4, 5)] + [
        line(n, 100.0 * n) for n in (4, 5, 6, 7)
    ]
    write_lines(run / "timeline.jsonl", [*lines, {"phase": "rl", "iteration": 8}])
    found = read_run(run)
    assert [row["iteration"] for row in shown_iterations(found)] == [3, 4, 5]
    assert shown_iterations(found)[1]["ranks"]["0"][0][1] == 400.0
    assert Image.open(io.BytesIO(draw_figures(found)["timeline"])).width == 2200


def test_a_timeline_leaves_out_iterations_whose_parts_were_too_short(tmp_path):
    run = write_run(tmp_path, iterations=4)
    parts = [["rollout", 10.0, 12.0]], [], [["grading", 20.0, 21.0]], [["update", 30.0, 31.0]]
    lines = [
        {"phase": "rl", "iteration": number, "ranks": {"0": own}}
        for number, own in enumerate(parts, 1)
    ]
    write_lines(run / "timeline.jsonl", lines)
    assert [row["iteration"] for row in shown_iterations(read_run(run))] == [1, 4]
    assert "timeline" in draw_figures(read_run(run))
    write_lines(run / "timeline.jsonl", lines[1:3])
    assert "timeline" not in draw_figures(read_run(run))


def test_comparison_of_seeds(tmp_path):
    seeds = [read_run(write_run(tmp_path / str(s), iterations=4, sft=0, seed=s)) for s in (0, 1)]
    path = write_comparison({"two seeds": seeds, "one": seeds[:1]}, tmp_path / "out" / "c.png")
    assert Image.open(io.BytesIO(path.read_bytes())).width == 2200
    write_lines(tmp_path / "metrics.jsonl", [{"phase": "rl", "iteration": 1}])
    with pytest.raises(ValueError, match="has no evaluation"):
        write_comparison({"none": [read_run(tmp_path)]}, path)
    with pytest.raises(ValueError, match="no runs to compare"):
        write_comparison({"none": []}, path)


def test_labels_are_pushed_apart_as_little_as_needed():
    assert spread([0.1, 0.9], [0.2, 0.2]) == [0.1, 0.9]
    moved = spread([0.5, 0.5, 0.52], [0.1, 0.1, 0.1])
    assert all(b - a >= 0.1 - 1e-12 for a, b in zip(moved, moved[1:], strict=False))
    assert abs(sum(moved) / 3 - (0.5 + 0.5 + 0.52) / 3) < 1e-12
