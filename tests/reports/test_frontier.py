"""The frontier: lines by task, model and length; figures for what there is."""

import io
import json

import matplotlib
import numpy as np
import pytest
from PIL import Image

from agrpo_megatron.evaluation.statistics import wilson
from agrpo_megatron.reports.evaluations import (
    find_evaluations,
    markdown_table,
    print_results,
)
from agrpo_megatron.reports.plots.frontier import frontier_lines, write_frontier


def cell(task, length, steps, *, accuracy, **more):
    return {
        "task": task,
        "completion_length": length,
        "denoising_steps": steps,
        "problems": 200,
        "accuracy": accuracy,
        "accuracy_interval": list(wilson(accuracy, 200)),
        "score": accuracy,
        "summary": {},
        "failures": 0,
        "steps_run": float(steps),
        "completion_tokens": length / 2,
        "flops": 1e9 * steps * length,
        **more,
    }


def evaluation(label, *, tasks=("gsm8k",), lengths=(128,), steps=(4, 8, 16), gain=0.0):
    cells = [
        cell(task, length, count, accuracy=min(1.0, 0.1 + gain + 0.02 * count))
        for task in tasks
        for length in lengths
        for count in steps
    ]
    return {"label": label, "finished": True, "cells": cells}


def test_lines_are_by_task_model_and_length():
    first = evaluation("before", tasks=("gsm8k", "math"), lengths=(128, 256))
    more = evaluation("before", steps=(2, 32))
    second = evaluation("after", gain=0.2)
    lines = frontier_lines([first, more, second])
    assert list(lines) == ["gsm8k", "math"]
    names = [(line.label, line.length) for line in lines["gsm8k"]]
    assert names == [("before", 256), ("before", 128), ("after", 128)]
    joined = lines["gsm8k"][1]
    assert joined.steps.tolist() == [2, 4, 8, 16, 32], "evaluations of one label are one line"
    assert joined.flops.tolist() == [1e9 * 128 * steps for steps in (2, 4, 8, 16, 32)]
    for drawn in lines["gsm8k"]:
        assert np.all(drawn.low < drawn.accuracy) and np.all(drawn.accuracy < drawn.high)


def test_two_values_of_one_cell_are_refused_and_equal_ones_are_one():
    once, other = evaluation("model"), evaluation("model", gain=0.1)
    assert len(frontier_lines([once, once])["gsm8k"]) == 1
    with pytest.raises(ValueError, match="model has two values on gsm8k at length 128 and 4 steps"):
        frontier_lines([once, other])
    with pytest.raises(ValueError, match="no evaluation has finished a cell"):
        frontier_lines([{"label": "model", "cells": []}])


FIGURES = {
    "two models": ([evaluation("before"), evaluation("after", gain=0.2)], 840),
    "one length of one model": ([evaluation("model")], 840),
    "several lengths": ([evaluation("model", lengths=(64, 128, 256))], 840),
    "two tasks": ([evaluation("model", tasks=("gsm8k", "math"))], 1580),
    "one point": ([evaluation("model", steps=(4,))], 840),
    "many models": ([evaluation(f"model {i}", gain=i / 50) for i in range(9)], 840),
    "many steps": ([evaluation("model", steps=range(1, 40))], 840),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_for_what_there_is(tmp_path, name):
    evaluations, height = FIGURES[name]
    before = dict(matplotlib.rcParams)
    path = write_frontier(evaluations, tmp_path / "new" / "frontier.png")
    image = Image.open(io.BytesIO(path.read_bytes()))
    assert image.size == (2200, height)
    assert len(set(image.convert("RGB").resize((275, 105)).tobytes())) > 50  # not blank
    assert dict(matplotlib.rcParams) == before


def test_tables_hold_every_cell_and_what_some_lack_is_empty(capsys):
    sudoku = evaluation("a|b", tasks=("sudoku",), steps=(4,))
    sudoku["cells"][0] |= {"summary": {"cells/macro": 0.4321}, "failures": 2}
    sudoku["cells"][0]["pass_at"] = {"1": {"value": 0.2}, "4": {"value": 0.55}}
    both = [sudoku, evaluation("c", steps=(4, 8))]
    lines = markdown_table(both).splitlines()
    assert len(lines) == 2 + 3 and lines[2].startswith("| a\\|b | sudoku | 128 | 4 | 200 |")
    assert all(line.count(" | ") == lines[0].count(" | ") for line in lines)
    assert "pass@4" in lines[0] and "55.0%" in lines[2] and "0.4321" in lines[2]
    assert "pass@1" not in lines[0], "it is the accuracy"
    print_results(both)
    printed = capsys.readouterr().out
    for text in ("a|b", "sudoku", "gsm8k", "0.4321", "failures"):
        assert text in printed
    assert "\u2026" not in printed, "no cell is cut"


def test_evaluations_are_found_by_directory_and_by_run(tmp_path):
    for name in ("best", "latest"):
        folder = tmp_path / "run" / "evaluations" / name
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text("{}")
        with pytest.raises(ValueError, match="has no results.json yet"):
            find_evaluations(folder)
        (folder / "results.json").write_text(json.dumps(evaluation(f"run {name}")))
    labels = [results["label"] for _, results in find_evaluations(tmp_path / "run")]
    assert labels == ["run best", "run latest"]
    labels = [results["label"] for _, results in find_evaluations(tmp_path / "run", "mine")]
    assert labels == ["mine best", "mine latest"]
    ((path, results),) = find_evaluations(tmp_path / "run" / "evaluations" / "best", "mine")
    assert path.name == "best" and results["label"] == "mine"
    assert find_evaluations(tmp_path) == []
