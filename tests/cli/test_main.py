"""The `agrpo` command: wrong input is one line and status 2, and every sub-command explains."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml

from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
# Sudoku with partial credit, after a supervised phase that has learned to write digits: rewards
# differ, so the reinforcement learning of this run has gradients.
SETTINGS = {
    "run": {"threads": 1},
    "model": {
        "num_layers": 1,
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_attention_heads": 2,
        "max_sequence_length": 64,
    },
    "task": {
        "name": "sudoku",
        "train_problems": 32,
        "eval_problems": 6,
        "options": {"clues": 8, "partial_credit": 1.0},
    },
    "sampling": {"completion_length": 16, "block_length": 16, "denoising_steps": 4},
    "sft": {"iterations": 40, "batch_size": 16, "optimizer": {"learning_rate": 0.02}},
    "algorithm": {"prompts_per_iteration": 2, "group_size": 4, "mc_samples": 2},
    "train": {"iterations": 3},
    "evaluation": {"interval": 2},
    "logging": {"wandb": "disabled"},
}
# Calls `agrpo` several times; after each it prints what was loaded by then, and the status.
PROBE = """
import json, sys
from agrpo_megatron.cli.main import main
for arguments in json.loads(sys.argv[1]):
    try:
        status = main(arguments)
    except SystemExit as left:  # --help
        status = left.code or 0
    loaded = [name for name in ("torch", "megatron.core", "transformers") if name in sys.modules]
    print("loaded:", *loaded)
    print(status, end="\\0", flush=True)
    print(end="\\0", file=sys.stderr, flush=True)
"""


def write_settings(path, **changes):
    """Write the settings file, with sections changed key by key."""
    tree = {name: dict(section) for name, section in SETTINGS.items()}
    for name, section in changes.items():
        tree.setdefault(name, {}).update(section)
    path.write_text(yaml.safe_dump(tree))
    return path


def probe(*arguments, **environment):
    """Return how one call ends in a process of its own."""
    return probe_all([arguments], **environment)[0]


def probe_all(several, **environment):
    """Return how several calls end in one process, which no call before them has warmed."""
    words = [[str(argument) for argument in arguments] for arguments in several]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(words)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    found = []
    for out, error in zip(done.stdout.split("\0"), done.stderr.split("\0"), strict=True):
        stdout, end, status = out.rpartition("\n")
        found.append(subprocess.CompletedProcess(words, int(status or 0), stdout + end, error))
    assert (found[-1].stdout, found[-1].stderr) == ("", ""), "nothing comes at the end"
    return found[:-1]


def call(arguments, folder, *, draws=False):
    """Call the command on this rank, with what it prints sent to a file; returns both.

    Args:
        draws: a run that ends has the figures of its report, too: two seconds of CPU time.
    """
    os.environ["COLUMNS"] = "200"
    import agrpo_megatron.cli.main as command

    conclude = command._conclude if draws else partial(_without_figures, command._conclude)
    printed = Path(folder) / f"printed-{os.environ['RANK']}"
    with (
        printed.open("w") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        patch.object(command, "_conclude", conclude),
    ):
        status = command.main([str(argument) for argument in arguments])
    return status, printed.read_text()


def _without_figures(conclude, run_dir):
    from agrpo_megatron.reports.page import html

    with patch.object(html, "draw_figures", lambda *_: {}):
        conclude(run_dir)


def call_all(several, folder):
    """Make several calls on this rank."""
    return [call(arguments, folder) for arguments in several]


def agrpo(folder, *arguments):
    """Return exit status and output of one call."""
    return run_ranks(1, call, arguments, folder)[0]


WRONG = {
    "unknown key": (
        {"sampling": {"block_lenght": 8}},
        "sampling.block_lenght is not a setting; did you mean sampling.block_length?",
    ),
    "wrong type": (
        {"train": {"iterations": "many"}},
        "train.iterations='many' has the wrong type; it must be an integer",
    ),
    "wrong choice": (
        {"sampling": {"unmasking": "rand"}},
        "sampling.unmasking=rand must be one of random, low_confidence, entropy, margin, "
        "bernoulli, leftmost; did you mean random?",
    ),
    "out of range": (
        {"algorithm": {"group_size": 1}},
        "algorithm.group_size=1 must be at least 2",
    ),
    "blocks that do not divide": (
        {"sampling": {"block_length": 6}},
        "sampling.block_length=6 does not divide sampling.completion_length=16; use 4 or 8",
    ),
    "more ranks than were started": (
        {"parallel": {"tensor": 2}},
        "parallel.tensor=2 does not divide the 1 ranks that were started; start 2 ranks "
        "(torchrun --nproc-per-node 2) or use parallel=tp1-pp1-cp1-dp1, "
        "the nearest layout that fits",
    ),
    "a prompt that leaves no room": (
        {"model": {"max_sequence_length": 24}},
        "model.max_sequence_length=24 leaves 8 tokens for prompts besides "
        "sampling.completion_length=16: 32 of 32 training problems have prompts over that, the "
        "longest of 17 tokens; use at least 33, or leave them out by task.long_prompts=drop",
    ),
    "a solution that does not fit": (
        {"sampling": {"completion_length": 8, "block_length": 8}},
        "sampling.completion_length=8 is shorter than the longest solution of task sudoku "
        "(16 tokens); use at least 16",
    ),
    "a task option": (
        {"task": {"options": {"clue": 8}}},
        "task.options.clue is not an option of sudoku; did you mean clues?",
    ),
    "a missing tokenizer": (
        {"tokenizer": {"path": "/nowhere/tokenizer.model"}},
        "tokenizer.path=/nowhere/tokenizer.model does not exist; give a sentencepiece .model "
        "file, a Hugging Face directory, or null for the built-in characters",
    ),
    "missing weights": (
        {"model": {"load": "/nowhere/weights"}},
        "model.load=/nowhere/weights is not a directory; give a Hugging Face or run folder, or "
        "fetch one by `agrpo prefetch FILE`",
    ),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Return the run's directory and how `agrpo train` ends, for each of `WRONG`."""
    folder, files = tmp_path_factory.mktemp("wrong"), []
    runs = [folder / f"run{number}" for number in range(len(WRONG))]
    for run_dir, (changes, _) in zip(runs, WRONG.values(), strict=True):
        path = run_dir.with_suffix(".yaml")
        files.append(write_settings(path, run={"dir": str(run_dir)}, **changes))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = probe_all([("train", file) for file in files])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    return dict(zip(WRONG, zip(runs, ended, strict=True), strict=True))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_one_line_and_status_2_before_torch_is_loaded(refused, name):
    """No torch, so no process group. Time is that of the processor: a machine may be busy."""
    run_dir, done = refused[name]
    assert done.stderr == f"agrpo: error: {WRONG[name][1]}\n"
    assert (done.returncode, done.stdout) == (2, "loaded:\n")
    assert not run_dir.exists(), "nothing is left behind"


def test_a_missing_file_and_a_bad_override_are_refused_the_same_way(tmp_path):
    file = write_settings(tmp_path / "good.yaml")
    cases = {
        ("train", tmp_path / "none.yaml"): "none.yaml: No such file or directory",
        ("train", file, "run.seed"): "override 'run.seed': write section.key=value",
        ("evaluate", tmp_path): f"{tmp_path} is not a run directory: it has no config.yaml",
        ("sample", file): f"{file} names no weights; set model.load, or give a run directory",
        ("report", tmp_path): f"run directory {tmp_path} has no metrics.jsonl",
    }
    for done, said in zip(probe_all(cases), cases.values(), strict=True):
        assert done.returncode == 2
        assert done.stderr.startswith("agrpo: error: ") and done.stderr.count("\n") == 1
        assert said in done.stderr


def test_a_replay_of_nothing_is_refused_before_any_rank_starts(tmp_path):
    file, source = write_settings(tmp_path / "good.yaml"), tmp_path / "no run: here"
    more = ["--from-rollouts", source, "launch.gpus_per_node=0", f"run.dir={tmp_path / 'run'}"]
    for done in probe_all(
        [["train", file, *more], ["launch", file, "--nodes", 1, "--dry-run", *more]]
    ):
        said = f"agrpo: error: train.from_rollouts={source} is not a run directory"
        assert done.stderr.startswith(said), done.stderr
        assert done.returncode == 2 and "megatron" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_one_rank_of_many_speaks(tmp_path):
    file = write_settings(tmp_path / "wrong.yaml", train={"iteration": 1})
    first = probe("train", file, RANK="0", WORLD_SIZE="2")
    second = probe("train", file, RANK="1", WORLD_SIZE="2")
    assert first.returncode == second.returncode == 2
    assert "train.iteration is not a setting" in first.stderr and second.stderr == ""


COMMANDS = ("train", "sft", "evaluate", "sample", "report", "doctor", "config", "launch")


def test_every_sub_command_explains_itself_at_once():
    whole, *parts = probe_all([("--help",), *((name, "--help") for name in COMMANDS)])
    assert whole.returncode == 0
    for name, done in zip(COMMANDS, parts, strict=True):
        assert f"  {name} " in whole.stdout
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout.startswith(f"usage: agrpo {name} ")


def test_config_explains_every_setting_and_loads_nothing():
    whole = probe("config", COLUMNS="200")
    assert whole.returncode == 0 and "loaded:\n" in whole.stdout
    for key in ("run.dir", "sampling.unmasking", "optimizer.learning_rate", "ddp"):
        assert f"{key} " in whole.stdout
    assert "random | low_confidence | entropy" in whole.stdout


def test_doctor_names_what_is_there_and_what_is_not(tmp_path):
    status, printed = agrpo(tmp_path, "doctor")
    assert status == 0
    for part in ("Python", "PyTorch", "Megatron-Core", "Transformer Engine", "wandb"):
        assert part in printed
    assert "kernels: default settings; agrpo doctor FILE" in printed


def test_doctor_says_which_kernels_settings_take(tmp_path):
    file = write_settings(tmp_path / "my.yaml")
    for arguments in ((file, "precision=bf16"), ("precision=bf16",)):
        status, printed = agrpo(tmp_path, "doctor", *arguments)
        assert status == 0
        assert "precision=bf16" in printed.split("kernels: ")[1].splitlines()[0]
        assert "bfloat16" in printed
    status, printed = agrpo(tmp_path, "doctor", file, "kernels.layer_spec=te")
    assert (status, printed.count("\n")) == (2, 1)
    assert printed.startswith("agrpo: error: kernels.layer_spec=te has no attention in float32")


def _call_without_drawing(arguments, folder):
    return *call(arguments, folder), "matplotlib" in sys.modules


def test_what_a_machine_cannot_do_is_refused_before_anything_is_moved(tmp_path):
    """And before what only the report needs is imported."""
    if torch.cuda.is_available():
        pytest.skip("says what a machine without a GPU refuses")
    file = write_settings(tmp_path / "my.yaml", run={"dir": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    words = ["train", file, "--restart", "precision=fp8"]
    ((status, printed, can_draw),) = run_ranks(1, _call_without_drawing, words, tmp_path)
    assert (status, can_draw) == (2, False)
    assert printed == (
        "agrpo: error: precision=fp8 needs a GPU, and torch sees none; run where there is one, or "
        "use precision=bf16\n"
    )
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]


def test_a_reader_that_ends_early_is_no_error():
    command = [sys.executable, "-m", "agrpo_megatron", "config", "--markdown"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_torchrun_ends_its_report_with_the_refusal(tmp_path, monkeypatch, capsys):
    """It shows a traceback of its own after any failed rank, and then what is in this file."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from agrpo_megatron.cli.main import main

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert main(["config", str(tmp_path / "nothing.yaml")]) == 2
    refused = capsys.readouterr().err.strip()
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    last = str(ChildFailedError("agrpo_megatron", {0: failure})).strip().splitlines()[-2]
    prefix, refusal = refused[:14], refused[14:]
    assert (prefix, last) == ("agrpo: error: ", f"  traceback : {refusal}")
