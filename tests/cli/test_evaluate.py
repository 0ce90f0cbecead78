"""`agrpo evaluate` and `agrpo report`: on runs, checkpoints and Hugging Face directories."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.test_main import ROOT, agrpo, call, call_all, probe, probe_all
from tests.cli.test_run import run
from tests.ranks import run_ranks

__all__ = ["run"]  # the fixture: a finished run, trained once for this file
HF = ROOT / "tests" / "fixtures" / "llada_tiny" / "hf"
ON_HF = ["task.name=countdown", "task.eval_problems=5", "task.train_problems=8"]
ON_HF += [f"tokenizer.path={ROOT / 'agrpo_megatron' / 'text' / 'characters.model'}"]
ON_HF += ["sampling.completion_length=16", "sampling.block_length=8", "run.threads=1"]
ON_HF += ["sampling.denoising_steps=4"]


def _results(output):
    return json.loads((output / "results.json").read_text())


def _json(printed):
    """Return the JSON that was printed, behind what was said of the progress."""
    return json.loads(printed[printed.index("{\n") :])


def test_evaluate_repeats_the_accuracy_that_training_reported(run, tmp_path):
    run_dir, _, _ = run
    command = ["evaluate", run_dir, "--json", "--output", tmp_path / "one"]
    status, printed = agrpo(tmp_path, *command)
    assert status == 0
    results = _results(tmp_path / "one")
    assert _json(printed) == results
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert results["label"] == "run rl-000003" and results["finished"]
    (cell,) = results["cells"]
    assert [cell[key] for key in ("accuracy", "score", "problems")] == [
        last[key] for key in ("accuracy", "reward/mean", "problems")
    ]
    assert cell["parts"]["valid"] == last["reward/valid"]
    assert cell["accuracy_interval"] == [last["accuracy_low"], last["accuracy_high"]]
    command[-1] = tmp_path / "two"
    both = run_ranks(2, call, [*command, "parallel.tensor=2"], tmp_path)
    assert [status for status, _ in both] == [0, 0]
    assert _results(tmp_path / "two") == results
    assert both[1][1] == "", "one rank speaks"


def test_what_is_finished_is_told_and_begun_anew_only_when_asked(run, tmp_path):
    run_dir, _, _ = run
    command = ["evaluate", run_dir, "--name", "seeds"]
    output = run_dir / "evaluations" / "rl-000003-seeds"
    calls = [command, command, [*command, "run.seed=1"], [*command, "run.seed=1", "--restart"]]
    first, again, changed, restarted = run_ranks(1, call_all, calls, tmp_path)[0]
    for status, printed in (first, again, restarted):
        assert status == 0 and "run rl-000003-seeds  sudoku" in printed
        assert "length  steps  problems  accuracy  95 % interval" in printed
        assert f"next    agrpo report {output}" in printed
    begun = "evaluating 6 problems of sudoku, at 1 lengths and steps, in 1 batches"
    assert first[1].startswith(begun) and begun not in again[1]
    assert "cell 1/1" in first[1] and "cell 1/1" not in again[1]
    assert f"{output} is finished; add --restart to evaluate again" in again[1]
    assert changed[0] == 2
    assert f"{output} holds an evaluation with seed=0, not 1; use another" in changed[1]
    assert f"the earlier evaluation is now {output}.1" in restarted[1]
    assert (output / "table.md").read_text().startswith("| model | task | length | steps |")


def test_a_megatron_checkpoint_is_evaluated_as_its_run_is(run, tmp_path):
    run_dir, _, _ = run
    direct = run_dir / "checkpoints" / "sft-000040"
    calls = [
        ["evaluate", run_dir, "--checkpoint", "sft-000040", "--output", tmp_path / "run"],
        ["evaluate", direct, "--output", tmp_path / "direct"],
        ["evaluate", direct, "--name", "short", "evaluation.steps=[2]"],
    ]
    assert [status for status, _ in run_ranks(1, call_all, calls, tmp_path)[0]] == [0, 0, 0]
    assert _results(tmp_path / "run") == _results(tmp_path / "direct")
    assert (run_dir / "evaluations" / "sft-000040-short" / "results.json").exists()


def test_a_hugging_face_directory_needs_no_settings_file(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text("task: {name: countdown, eval_problems: 5, train_problems: 8}\n")
    calls = [
        ["evaluate", HF, *ON_HF, "--sweep", "--output", tmp_path / "direct"],
        ["evaluate", HF, *ON_HF[3:], "--settings", file, "--sweep", "--output", tmp_path / "file"],
    ]
    assert [status for status, _ in run_ranks(1, call_all, calls, tmp_path)[0]] == [0, 0]
    results = _results(tmp_path / "direct")
    assert results["label"] == "hf"
    assert [cell["denoising_steps"] for cell in results["cells"]] == [2, 4, 6, 8, 16]
    assert _results(tmp_path / "file") == results
    flops = [cell["flops"] for cell in results["cells"]]
    assert flops == sorted(flops) and flops[0] > 0


WRONG = {
    "a length that blocks do not divide": (
        ["evaluation.completion_lengths=[12]"],
        "evaluation.completion_lengths=12 is not a multiple of the block length 8; use 8 or 16, "
        "or set evaluation.block_length",
    ),
    "steps that do not fit": (
        ["evaluation.steps=[3]"],
        "evaluation.steps=3 does not fit completion length 16: it must be a multiple of its 2 "
        "blocks and at most 16; use 2 or 4, or evaluation.tokens_per_step, which fits every length",
    ),
    "tokens per step that do not fit": (
        ["evaluation.tokens_per_step=[3]"],
        "evaluation.tokens_per_step=3 does not divide the block length 8; use 2 or 4",
    ),
    "both ways of setting steps": (
        ["evaluation.steps=[4]", "evaluation.tokens_per_step=[2]"],
        "evaluation.steps=[4] and evaluation.tokens_per_step=[2] both set the steps; use one",
    ),
    "greedy samples": (
        ["evaluation.samples=4"],
        "evaluation.samples=4 asks for different completions of a problem, but "
        "evaluation.temperature=0 writes the same one each time",
    ),
    "an empty grid": (["evaluation.steps=[]"], "evaluation.steps=[] is empty"),
    "an unknown task": (
        ["evaluation.tasks={gsm9k: {}}"],
        "evaluation.tasks.gsm9k.name=gsm9k must be one of gsm8k",
    ),
    "a task that is no section": (
        ["evaluation.tasks={countdown: 1}"],
        "evaluation.tasks.countdown=1 must be a section",
    ),
    "a checkpoint of no run": (
        ["--checkpoint", "best"],
        f"--checkpoint best: {HF} is not a run directory; leave it out",
    ),
    "a folder of something else": (
        ["--output", str(ROOT / "tests")],
        f"{ROOT / 'tests'} is not empty and holds no evaluation; use another --output",
    ),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Return how `agrpo evaluate` ends, for each of `WRONG`, all in one process."""
    out = tmp_path_factory.mktemp("wrong") / "out"
    given = [changes for changes, _ in WRONG.values()]
    outputs = [[] if "--output" in changes else ["--output", out] for changes in given]
    pairs = zip(outputs, given, strict=True)
    ended = probe_all([["evaluate", HF, *output, *ON_HF, *changes] for output, changes in pairs])
    assert not out.exists(), "nothing is left behind"
    return dict(zip(WRONG, ended, strict=True))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_before_torch_is_loaded(refused, name):
    done, said = refused[name], WRONG[name][1]
    assert (done.returncode, done.stdout) == (2, "loaded:\n")
    assert done.stderr.startswith(f"agrpo: error: {said}") and done.stderr.count("\n") == 1


def test_restart_moves_nothing_but_an_evaluation(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    done = probe("evaluate", HF, "--output", tmp_path / "mine", *ON_HF, "--restart")
    assert done.returncode == 2
    assert f"{tmp_path / 'mine'} is not empty and holds no evaluation; use" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_target_that_is_not_there_is_named(tmp_path):
    done = probe("evaluate", tmp_path / "none")
    assert done.returncode == 2
    assert f"{tmp_path / 'none'} does not exist: it has no config.yaml, nor" in done.stderr
    done = probe("report", tmp_path)
    assert done.returncode == 2 and "has no metrics.jsonl" in done.stderr


def test_report_draws_the_frontier_of_models_and_lengths(run, tmp_path):
    run_dir, _, _ = run
    calls = [
        ["evaluate", run_dir, "--checkpoint", name, "--name", "sweep", "--sweep"]
        for name in ("sft-000040", "rl-000003")
    ]
    folder = run_dir / "evaluations"
    before, after = folder / "sft-000040-sweep", folder / "rl-000003-sweep"
    figure = tmp_path / "figures" / "frontier.png"
    calls += [["report", f"before={before}", f"after={after}", "--output", figure]]
    calls += [["report", before, after]]
    *_, (status, printed), (_, by_default) = run_ranks(1, call_all, calls, tmp_path)[0]
    assert status == 0 and by_default.startswith(str(folder / "frontier.png"))
    assert printed.splitlines()[:2] == [str(figure), str(figure.with_suffix(".md"))]
    table = figure.with_suffix(".md").read_text()
    assert table.count("| before |") == table.count("| after |") == 5
    assert Image.open(figure).width == 2200


def test_help_teaches():
    done = probe("evaluate", "--help")
    for word in ("tokens_per_step=[2]", "--sweep", "evaluation.samples=16", "split=train"):
        assert word in done.stdout


@pytest.mark.slow
def test_the_command_goes_on_after_kill_9(run, tmp_path):
    """A process of `python -m agrpo_megatron evaluate`, killed from outside in the middle."""
    run_dir, _, _ = run
    options = ["--sweep", "evaluation.batch_size=1", "evaluation.completion_lengths=[16,32]"]
    command = ["evaluate", str(run_dir), *options, "--output"]
    process = subprocess.Popen(
        [sys.executable, "-m", "agrpo_megatron", *command, str(tmp_path / "cut")],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    written, deadline = tmp_path / "cut" / "completions.jsonl", time.monotonic() + 240
    try:
        while _count(written) < 7:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline, "it wrote no completions"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 7 <= _count(written) < 60, "it was killed in the middle"
    calls = [[*command, tmp_path / name] for name in ("cut", "whole")]
    assert [status for status, _ in run_ranks(1, call_all, calls, tmp_path)[0]] == [0, 0]
    for name in ("results.json", "completions.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
