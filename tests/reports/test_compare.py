"""Several runs on one page: families by their settings, curves along any axis, what made each."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml

from agrpo_megatron.reports.families import curve, differences, families
from agrpo_megatron.reports.page.compare import write_comparison_page
from agrpo_megatron.reports.page.html import write_report
from agrpo_megatron.reports.page.provenance import made_by, times
from agrpo_megatron.reports.plots.denoising import part_rows
from agrpo_megatron.reports.plots.families import mean_and_band
from agrpo_megatron.reports.plots.style import LIGHT, end_labels, new_figure
from agrpo_megatron.reports.read import read_run
from agrpo_megatron.reports.text import compact
from tests.reports.synthetic import write_lines, write_run

ATTEMPT = {
    "time": "2026-01-02T03:04:05+00:00",
    "version": "0.1.0",
    "commit": "c0ffee" * 6 + "abcd",
    "changed": True,
    "packages": {"python": "3.12.1", "torch": "2.9.0"},
    "command": "agrpo train a.yaml run.seed=<b>",
    "host": "node7",
    "job": None,
    "ranks": 8,
    "device": "NVIDIA H200",
    "layout": "tp2-pp1-cp1",
    "precision": "bf16",
}


def _run(path, *, seed=0, rate=1e-4, attempts=1):
    """Write a run of 4 iterations that took 10 s each, after 100 s, and 5 FLOPs each."""
    write_run(path, iterations=4, sft=2, interval=2, seed=seed)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["optimizer"]["learning_rate"] = rate
    config["run"]["threads"] = seed + 1  # alters no number
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["totals/seconds"] = 100.0 + 10 * row["iteration"] if row["phase"] != "sft" else 1.0
        if row["phase"] == "rl":
            row["flops"] = 5.0
    write_lines(path / "metrics.jsonl", rows)
    write_lines(path / "provenance.jsonl", [ATTEMPT] * attempts)
    return read_run(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first = [_run(folder / f"a{seed}", seed=seed) for seed in (0, 1)]
    return [*first, _run(folder / "b0", rate=3e-4, attempts=2)]


def test_a_family_differs_in_seed_and_in_what_alters_no_number(runs):
    found = families(runs)
    assert {label: [run.path.name for run in own] for label, own in found.items()} == {
        "learning_rate=0.0001": ["a0", "a1"],
        "learning_rate=0.0003": ["b0"],
    }
    assert differences(runs) == {"optimizer.learning_rate": ["0.0001", "0.0001", "0.0003"]}
    assert list(families(runs[:2])) == ["a0 and 1 more"] and differences(runs[:2]) == {}


def test_runs_without_settings_are_families_of_their_own(runs, tmp_path):
    plain = []
    for name in ("x", "y"):
        write_run(tmp_path / name, iterations=2, sft=0)
        (tmp_path / name / "config.yaml").unlink()
        plain.append(read_run(tmp_path / name))
    assert [len(own) for own in families([*plain, runs[0]]).values()] == [1, 1, 1]


def test_curves_run_along_iterations_flops_and_hours(runs):
    def along(axis, key="accuracy", phase="eval"):
        return curve(runs[0], key, phase=phase, axis=axis)[0].tolist()

    assert along("iteration") == [0, 2, 4]
    assert along("flops") == [0, 10, 20]
    assert along("seconds") == pytest.approx([100 / 3600, 120 / 3600, 140 / 3600])
    assert along("flops", "reward/mean", "rl") == [5, 10, 15, 20]
    assert along("iteration", "nothing", "rl") == []


def test_a_mean_spans_what_all_seeds_have_and_its_band_is_the_t_interval():
    seeds = [
        (np.array([0.0, 2.0]), np.array([1.0, 3.0])),
        (np.array([1.0, 4.0]), np.array([4.0, 4.0])),
    ]
    x, mean, low, high = mean_and_band(seeds, points=2)
    assert x.tolist() == [1.0, 2.0] and mean.tolist() == [3.0, 3.5]
    # Of two values: t(0.975, 1) = 12.7062 times half of their distance.
    assert (high - low)[0] / 2 == pytest.approx(12.7062 * 1.0, rel=1e-4)
    assert (high - low)[1] / 2 == pytest.approx(12.7062 * 0.5, rel=1e-4)


def test_the_page_says_what_differs_and_what_made_each_run(runs, tmp_path):
    page = write_comparison_page(runs, tmp_path / "new" / "c.html").read_text(encoding="utf-8")
    for shown in (
        "3 runs",
        "2 families",
        "By FLOPs",
        "By hours",
        "optimizer.learning_rate",
        "mean of 2",
        "c0ffeec0ff, with changes",
        "agrpo train a.yaml run.seed=&lt;b&gt;",
        "8 x NVIDIA H200",
        "node7",
        "2 min 20 s",
        "0.3111",  # GPU-hours: 140 s of 8 GPUs
        "2.9.0",
    ):
        assert shown in page, shown
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 6 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "<script" not in page


def _resumed(run, *attempts):
    """Return a run with attempts of so many ranks that began after so many seconds."""
    lines = [{**ATTEMPT, "ranks": r, "seconds_before": s, "command": c} for r, s, c in attempts]
    return replace(run, provenance=tuple(lines))


def test_device_hours_are_of_the_ranks_that_each_attempt_had(runs):
    """140 s: 8 ranks in the first 50 s, 2 ranks in 90."""
    resumed = _resumed(runs[0], (8, 0.0, "agrpo train a.yaml"), (2, 50.0, "agrpo train runs/a"))
    assert times(resumed)["GPU-hours"] == compact((8 * 50 + 2 * 90) / 3600)
    assert made_by(resumed)["command"] == "agrpo train a.yaml; then agrpo train runs/a"
    unknown = _resumed(runs[0], (8, None, "a"), (2, None, "a"))
    assert "GPU-hours" not in times(unknown) and made_by(unknown)["command"] == "a"
    same = _resumed(runs[0], (8, None, "a"), (8, None, "a"))
    assert times(same)["GPU-hours"] == compact(8 * 140 / 3600)


def test_options_of_a_task_differ_one_by_one(runs):
    def with_options(run, **options):
        return replace(run, settings={**run.settings, "task.options": options})

    pair = with_options(runs[0], numbers=2, low=5), with_options(runs[0], numbers=3, low=5)
    assert differences(pair) == {"task.options.numbers": ["2", "3"]}
    assert list(families(pair)) == ["numbers=2", "numbers=3"]


def test_the_page_of_a_run_has_its_attempts_and_its_changes(runs, tmp_path):
    path = tmp_path / "run"
    _run(path)
    change = {"phase": "rl", "iteration": 2, "key": "train.iterations", "old": 2, "new": 4}
    write_lines(path / "changes.jsonl", [change])
    page = write_report(path)[-1].read_text(encoding="utf-8")
    for shown in (
        "Settings that changed",
        "rl iteration 2",
        "GPU-hours",
        "c0ffeec0ff, with changes",
    ):
        assert shown in page
    assert "Settings that differ from their defaults" in page
    assert "torch 2.9.0" in page


def test_labels_stand_at_the_ends_of_their_lines():
    axes = new_figure(6, 3).subplots()
    axes.plot([0, 100], [0, 1])
    axes.margins(x=0.01)
    ends = [(50.0, 0.5, "early", LIGHT.blue), (100.0, 0.9, "late", LIGHT.red)]
    end_labels(axes, [*ends, (None, 0.9, "alarm", LIGHT.grey)])
    places = {text.get_text(): text.xy for text in axes.texts}
    assert places["early"][0] == pytest.approx(0.5, abs=0.03)
    assert places["late"][0] == places["alarm"][0] == 1.0
    assert abs(places["late"][1] - places["alarm"][1]) > 0.03  # pushed apart


def test_parts_of_the_denoising_are_lines_of_their_own(tmp_path):
    rows = [
        {"phase": "rl", "iteration": 1, "by_step/entropy": [2.0, None, 1.0]},
        {"phase": "rl", "iteration": 2, "by_step/ratio_error": [None, None]},
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    run = read_run(tmp_path)
    assert part_rows(run, "by_step/entropy") == [{"iteration": 1, "0": 2.0, "1": None, "2": 1.0}]
    assert part_rows(run, "by_step/ratio_error") == []
