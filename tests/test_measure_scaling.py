"""Scaling from finished runs: which kind, and the efficiency over the fewest ranks."""

import importlib
import json
import sys

import pytest

from agrpo_megatron.config.schema import to_yaml
from tests.cli.test_main import ROOT
from tests.training.tiny import tiny

sys.path.append(str(ROOT / "tools"))
measure_scaling = importlib.import_module("measure_scaling")

# By name: ranks, overrides, seconds. Twice the completions are twice the FLOPs.
RUNS = {
    "a/alone": (1, [], 4.0),
    "a/weak": (2, ["algorithm.prompts_per_iteration=6"], 5.0),
    "b/strong": (2, ["parallel=tp2"], 4.0),
    "b/other": (4, ["parallel=pp2", "algorithm.prompts_per_iteration=5"], 4.0),
}


def _made_run(run, ranks, overrides, seconds):
    (run / "launch").mkdir(parents=True)
    settings = tiny("model.mask_token_id=1", *overrides)
    (run / "config.yaml").write_text(to_yaml(settings))
    (run / "launch" / "sections.json").write_text(json.dumps({"world_size": ranks}))
    flops = 4e9 * settings.algorithm.prompts_per_iteration
    row = {"phase": "rl", "flops": flops, "timing/cpu": seconds, "timing/iteration": 99.0}
    lines = [json.dumps({**row, "iteration": number}) for number in range(1, 6)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_finished_runs_give_a_row_each_and_a_figure(tmp_path, monkeypatch, capsys):
    for name, made in RUNS.items():
        _made_run(tmp_path / name, *made)
    figure, folders = tmp_path / "a.png", [str(tmp_path / "a"), str(tmp_path / "b")]
    monkeypatch.setattr("sys.argv", ["", "--runs", *folders, "--figure", str(figure)])
    assert measure_scaling.main() == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[:6]]
    cells = [[cell.strip() for cell in line] for line in lines]
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    found = {row["scaling"]: (row["layout"], row["efficiency"]) for row in rows}
    assert found == {
        "both": ("tp1-pp1-cp1-dp1", "100 %"),
        "weak": ("tp1-pp1-cp1-dp2", "80 %"),
        "strong": ("tp2-pp1-cp1-dp1", "50 %"),
        "other": ("tp1-pp2-cp1-dp2", "42 %"),
    }
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_runs_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "--runs", str(tmp_path)])
    assert measure_scaling.main() == 2
    assert "--runs holds no run; give run directories" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["", "a.yaml"])  # without --output
    with pytest.raises(SystemExit):
        measure_scaling.main()
