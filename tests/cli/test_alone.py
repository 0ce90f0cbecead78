"""A run stands on its own: without what it started from, from any folder, and on a full disk."""

import errno
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest

from agrpo_megatron.runs.log import RunLog
from tests.cli.test_main import call, probe_all, write_settings
from tests.ranks import run_ranks
from tests.text.chat_tokenizers import write_llada
from tests.training.test_run import read
from tests.training.tiny import same_metrics

OWN = """
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.types import Problem, Reward


class Own(Task):
    is_bounded = True

    def load(self):
        problems = [Problem(str(i), {}, str(i)) for i in range(40)]
        return {"train": problems[4:], "eval": problems[:4]}

    def prompt(self, problem):
        return [{"role": "user", "content": problem.key + "="}]

    def reward(self, problem, completion):
        return Reward(len(completion.encode()) % 5 / 4, False)
"""
TEMPLATE = "{% for m in messages %}Q {{ m.content }} A {% endfor %}"
SHORT = ["sft.iterations=0", "train.iterations=2", "evaluation.interval=0", "checkpoint.interval=1"]
SHORT += ["logging.samples=1", "checkpoint.keep=9"]


def _calls(several, folder):
    """Make calls, each in a folder of its own; returns status and output of each."""
    found = []
    for place, arguments in several:
        os.chdir(place)
        found.append(call(arguments, folder))
    return found


def _call_all(folder, several):
    found = run_ranks(1, _calls, several, folder)[0]
    for (_, arguments), (status, printed) in zip(several, found, strict=True):
        assert status == 0, f"{arguments}: {printed}"
    return [printed for _, printed in found]


def _finished(folder):
    """Write a base model and a task into a folder, and train a run of them there."""
    (write_llada(folder / "llada") / "config.json").unlink()  # it describes no model
    (folder / "own.py").write_text(OWN)
    (folder / "own.jinja").write_text(TEMPLATE)
    own = {"name": str(folder / "own.py"), "options": {}}
    own |= {"train_problems": None, "eval_problems": None}
    file = write_settings(folder / "s.yaml", run={"dir": "run"}, task=own)
    made = ["run.dir=made", "tokenizer.path=llada", *SHORT]
    more = ["model.load=base", "tokenizer.chat_template=own.jinja", *SHORT]
    calls = [
        (folder, ["train", file, *made]),
        (folder, ["convert", "to-hf", "made", "base"]),
        (folder, ["train", file, *more]),
    ]
    _call_all(folder, calls)
    return ["train", file, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a folder with a finished run of a base model, and the command that trained it."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, _finished(folder)


@pytest.fixture
def alone(finished, tmp_path):
    """Return the folder of a run whose base, tokenizer and template are gone, and its command."""
    folder, command = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    return tmp_path, command


def test_checkpoints_carry_tokenizer_and_template(alone):
    folder, _ = alone
    hf = folder / "run" / "checkpoints" / "rl-000002" / "hf"
    assert (hf / "chat_template.jinja").read_text() == TEMPLATE
    assert (hf / "tokenizer.json").exists()


USES = {
    "evaluate the run": ["evaluate", "{run}", "--name", "a"],
    "evaluate an earlier checkpoint": ["evaluate", "{run}", "--checkpoint", "rl-000001"],
    "evaluate a checkpoint's folder": ["evaluate", "{run}/checkpoints/rl-000002", "--name", "b"],
    "sample": ["sample", "{run}", "-n", "1"],
    "sample a prompt": ["sample", "{run}", "--prompt", "1="],
    "export": ["convert", "to-hf", "{run}", "exported"],
    "report": ["report", "{run}"],
}


def test_a_run_is_used_from_another_folder_without_its_base(alone):
    folder, _ = alone
    calls = [(folder / "elsewhere", [a.format(run="../run") for a in use]) for use in USES.values()]
    printed = dict(zip(USES, _call_all(folder, calls), strict=True))
    assert "prompt      0=" in printed["sample"]


def test_evaluations_are_those_of_before_the_base_was_gone(finished, alone):
    (whole, _), (folder, _) = finished, alone
    calls = [(whole, ["evaluate", "run", "--name", "c"])]
    calls += [(folder, ["evaluate", "run", "--name", "c"])]
    calls += [(folder, ["evaluate", "run/checkpoints/rl-000002", "--name", "d"])]
    _call_all(folder, calls)
    mine, theirs, third = (
        json.loads((path / "evaluation.json").read_text())["evaluates"]
        for path in (
            folder / "run/evaluations/rl-000002-c",
            whole / "run/evaluations/rl-000002-c",
            folder / "run/evaluations/rl-000002-d",
        )
    )
    assert mine == theirs == third
    prompts = read(folder / "run/evaluations/rl-000002-c/completions.jsonl")
    assert prompts == read(whole / "run/evaluations/rl-000002-c/completions.jsonl")


def _cut_off(run):
    """Take away a run's last checkpoint, as if it had been killed before it."""
    shutil.rmtree(run / "checkpoints" / "rl-000002")
    (run / "checkpoints" / "latest").write_text("rl-000001")


def test_a_run_resumes_from_another_folder_without_its_base_as_with_it(finished, alone):
    (whole, _), (folder, command) = finished, alone
    _cut_off(folder / "run")
    calls = [(folder / "elsewhere", [*command, "run.dir=../run"])] * 2
    first, second = _call_all(folder, calls)
    assert "resuming after rl iteration 1" in first and "is finished" in second
    assert "more train.iterations to continue it" in second, "how to train it further"
    metrics = [read(path / "run" / "metrics.jsonl") for path in (folder, whole)]
    assert same_metrics(*metrics)
    for name in ("rl-000001", "rl-000002"):
        hf = folder / "run" / "checkpoints" / name / "hf"
        assert (hf / "chat_template.jinja").read_text() == TEMPLATE


def test_what_a_resumed_run_still_needs_is_refused_without_ranks(alone):
    folder, command = alone
    _cut_off(folder / "run")
    run = f"run.dir={folder / 'run'}"
    needed = {
        "algorithm.kl_coefficient=0.1": "model.load=base is not a directory",
        "model.load=other": "model.load=other is not a directory",
        "tokenizer.path=other": "tokenizer.path=other does not exist",
        "tokenizer.chat_template=plain": "tokenizer.chat_template=own.jinja, not plain",
        "sampling.top_k=3": ", not 3, which may not change",
    }
    ended = probe_all([[*command, run, more] for more in needed])
    for done, said in zip(ended, needed.values(), strict=True):
        assert done.returncode == 2 and "megatron" not in done.stdout
        assert said in done.stderr and "Traceback" not in done.stderr


def test_a_run_continues_from_the_weights_of_a_finished_one(alone):
    folder, command = alone
    more = ["run.dir=next", "model.load=../run", "tokenizer.chat_template=null"]
    _call_all(folder, [(folder / "elsewhere", [*command, *more])])
    hf = folder / "elsewhere" / "next" / "checkpoints" / "rl-000002" / "hf"
    assert (hf / "chat_template.jinja").read_text() == TEMPLATE
    assert (hf / "tokenizer.json").exists()


UNWRITABLE = {  # command below a file, and what names the place; the last one loads Megatron-Core
    "train": (["train", "{s}", "run.dir={file}/run"], "run.dir={file}/run cannot be written"),
    "train into a file": (["train", "{s}", "run.dir={file}"], "run.dir={file} cannot be written"),
    "sft": (["sft", "{s}", "run.dir={file}/run"], "run.dir={file}/run cannot be written"),
    "config": (["config", "{s}", "run.dir={file}/run"], "run.dir={file}/run cannot be written"),
    "launch": (
        ["launch", "{s}", "--nodes", "1", "--dry-run", "run.dir={file}/run"]
        + ["launch.gpus_per_node=0"],
        "run.dir={file}/run cannot be written",
    ),
    "evaluate": (
        ["evaluate", "{run}", "--output", "{file}/e"],
        "--output={file}/e cannot be written",
    ),
    "convert": (["convert", "to-hf", "{run}", "{file}/h"], "TARGET's folder={file} cannot be"),
}


def test_a_folder_that_cannot_be_written_is_refused_before_ranks_start(alone):
    folder, (_, file, *_) = alone
    (folder / "file").write_text("kept")
    names = {"s": file, "run": folder / "run", "file": folder / "file"}
    commands = [[word.format(**names) for word in words] for words, _ in UNWRITABLE.values()]
    for done, name in zip(probe_all(commands), UNWRITABLE, strict=True):
        assert done.returncode == 2 and "Traceback" not in done.stderr, name
        errors = [line for line in done.stderr.splitlines() if line.startswith("agrpo: error: ")]
        assert len(errors) == 1 and UNWRITABLE[name][1].format(**names) in errors[0], name
        assert "megatron" not in done.stdout or name == "convert"
    assert (folder / "file").read_text() == "kept"


# Where the disk is full: module, function, the call of it; and whether half is written.
FULL = {
    "metrics": ("log", "_append", 4),
    "the first line": ("log", "_append", 1),
    "the rollout cache": ("rollout.cache", "save_file", 3),
    "a checkpoint's tensors": ("checkpoint.saving", "_write", 2),
    "a checkpoint's sums": ("checkpoint.saving", "seal", 2),
    "the name of the latest": ("checkpoint.saving", "point", 3),
    "the model's files": ("training.opening", "describe_model", 1),
    "the report": ("reports.summary", "write_report", 1),
}


def _with_full_disk(where, several, folder):
    """Make calls; in the first, the disk is full in one place."""
    holder, name, last = where
    owner = RunLog if holder == "log" else importlib.import_module(f"agrpo_megatron.{holder}")
    own, counted = getattr(owner, name), []
    is_it = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def stand_in(*args, **kwargs):
        counted.append(name)
        if len(counted) != last or not is_it:
            return own(*args, **kwargs)
        if name == "_append":
            args[0]._files[args[1]].write('{"half')
            args[0]._files[args[1]].flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    setattr(owner, name, stand_in)
    return _calls(several, folder)


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_line_and_the_run_resumes_from_what_was_saved(finished, alone, name):
    (whole, _), (folder, command) = finished, alone
    calls = [(whole, [*command, f"run.dir={folder / 'new'}", "logging.wandb=disabled"])] * 2
    (status, printed), (again, more) = run_ranks(1, _with_full_disk, FULL[name], calls, folder)[0]
    assert (status, again) == (2, 0), printed + more
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("agrpo: error: ")]
    assert f"{folder / 'new'} cannot be written (No space left on device); " in line
    metrics = [read(path / "metrics.jsonl") for path in (folder / "new", whole / "run")]
    assert same_metrics(*metrics)


def test_a_full_disk_on_one_of_two_ranks_is_named_without_a_traceback(finished, alone):
    (whole, _), (folder, command) = finished, alone
    calls = [(whole, [*command, f"run.dir={folder / 'new'}", "parallel=tp2"])]
    with pytest.raises(AssertionError, match="ended with status 1"):
        run_ranks(2, _with_full_disk, FULL["a checkpoint's tensors"], calls, folder)
    printed = "".join(Path(folder, f"printed-{rank}").read_text() for rank in range(2))
    assert f"failed: DiskFull: {folder / 'new'} cannot be written (No space left" in printed
    assert "Traceback" not in printed
