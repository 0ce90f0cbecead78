"""`agrpo launch --dry-run`: a clean script that submits what was checked; refusals before it."""

import os
import subprocess

import pytest

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.launch.sweep import SWEEP, read_sweep
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.scaling.memory import worst_rank
from tests.cli.test_main import ROOT, probe, write_settings
from tests.launch.runs import leave_run

CPU = ("launch.gpus_per_node=0",)
# Names its words, then a number as --parsable prints it, which may carry the cluster's name.
RECORDER = """#!{bash}
{{ env | grep ^AGRPO_; printf '%s\\n' "$@"; echo; }} >> '{record}'
echo "4711;cluster"
"""
FOLDERS = ["plain", "a b", "it's", "$x `y` \\z", 'say "so"', "50%j", "caf\u00e9 & co;"]


@pytest.fixture
def record(no_slurm, tmp_path):
    """Return what runs a script and returns the lines of each call of sbatch, and the output."""
    path = tmp_path / "record"

    def run(script):
        (no_slurm / "env").symlink_to("/usr/bin/env")
        (no_slurm / "grep").symlink_to("/usr/bin/grep")
        stub = no_slurm / "sbatch"
        stub.write_text(RECORDER.format(bash="/bin/bash", record=path))
        stub.chmod(0o755)
        done = subprocess.run(["/bin/bash"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        calls = path.read_text().removesuffix("\n\n").split("\n\n")
        return [call.split("\n") for call in calls], done.stdout.split()

    return run


@pytest.mark.parametrize("name", FOLDERS)
def test_a_dry_run_prints_a_script_that_submits_every_word(
    name, launch, record, shellcheck, tmp_path
):
    """Whatever is in a path, shellcheck finds nothing, and sbatch gets the very words."""
    folder = tmp_path / name
    folder.mkdir()
    file = write_settings(folder / "settings.yaml", run={"dir": str(folder / "run")})
    text = "task.options={clues: 8, partial_credit: 1.0}"
    status, script, errors = launch(file, "--nodes", 2, "--dry-run", *CPU, text)
    assert (status, errors) == (0, "")
    shellcheck(script)
    assert not (folder / "run").exists(), "a dry run leaves nothing behind"
    (words,), printed = record(script)
    assert printed == ["4711;cluster"]
    at = words.index(str(ROOT / "slurm" / "train.sbatch"))
    assert words[at + 1 :] == [str(file), *CPU, text]
    run = folder / "run"
    for expected in (
        f"AGRPO_RUN_DIR={run}",
        f"AGRPO_ROOT={ROOT}",
        "AGRPO_RANKS_PER_NODE=1",
        "AGRPO_LAUNCHER=auto",
        "AGRPO_RESTARTS=3",
        "--export=ALL",
        "--parsable",
        "--job-name=agrpo-run",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--exclusive",
        "--signal=USR1@300",
        "--requeue",
        "--open-mode=append",
        f"--chdir={os.getcwd()}",
        f"--output={str(run).replace('%', '%%')}/launch/%j.log",
    ):
        assert words[:at].count(expected) == 1, expected
    assert not [word for word in words if word.startswith(("--gpus", "--time", "--partition"))]
    assert (run / "launch").is_dir(), "SLURM does not make the folder of its logs"


def test_every_setting_of_the_job_becomes_its_option(launch, record, shellcheck, tmp_path):
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(tmp_path / "run")})
    settings = {
        "partition": "gpu",
        "account": "me",
        "qos": "high",
        "time": "10:00:00",
        "grace": 0,
        "gpus_per_node": 4,
        "ranks_per_node": 2,
        "cpus_per_task": 6,
        "exclude": "n[1-2]",
        "launcher": "torchrun",
        "restarts": 0,
        "options": "[--reservation=x y, --mem=0]",
    }
    chosen = [f"launch.{key}={value}" for key, value in settings.items()]
    status, script, errors = launch(file, "--nodes", 1, "--dry-run", *chosen)
    assert (status, errors) == (0, "")
    shellcheck(script)
    assert "# warning   2 GPUs of each node would be idle: launch.ranks_per_node\n" in script
    assert "# time      limit 10:00:00, no signal before it ends\n" in script
    (words,), _ = record(script)
    expected = ["--partition=gpu", "--account=me", "--qos=high", "--time=10:00:00", "--mem=0"]
    expected += ["--gpus-per-node=4", "--cpus-per-task=6", "--exclude=n[1-2]", "--reservation=x y"]
    expected += ["AGRPO_RANKS_PER_NODE=2", "AGRPO_LAUNCHER=torchrun", "AGRPO_RESTARTS=0"]
    assert [words.count(word) for word in expected] == [1] * len(expected)
    assert not [w for w in words if w.startswith(("--signal", "--exclusive"))]


def test_notes_tell_directory_layout_memory_and_what_was_not_checked(launch, no_slurm, tmp_path):
    run = tmp_path / "run"
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(run)})
    given = [*CPU, "launch.ranks_per_node=4", "parallel=tp2"]
    _, script, _ = launch(file, "--nodes", 2, "--dry-run", *given)
    memory = worst_rank(resolve(load(Settings, file, given), world_size=8).settings, 8)
    for note in (
        f"# run       {run} (new)",
        "# layout    tp2-pp1-cp1-dp4 on 2 nodes x 4 ranks",
        f"# memory    {memory.total / 2**20:.1f} MiB in the fullest rank: weights ",
        "# time      the partition's limit, a signal 300 s before, to save and requeue",
        "# cluster   not checked: sbatch is not on PATH",
    ):
        assert f"\n{note}" in script


@pytest.mark.parametrize(
    ("layouts", "is_set"),
    [
        (["parallel=tp2"], True),
        (["parallel=dp4", "rollout.parallel=tp2"], True),
        (["parallel=cp2"], True),
        (["parallel=dp4"], False),
        (["parallel=tp2-pp2"], False),
        (["parallel=tp2", "rollout.parallel=pp2"], False),
    ],
)
def test_one_queue_only_where_messages_overlap_and_no_stages_wait(
    layouts, is_set, launch, no_slurm, tmp_path
):
    run = {"dir": str(tmp_path / "run")}
    file = write_settings(tmp_path / "s.yaml", run=run, model={"num_layers": 4})
    given = [*CPU, "launch.ranks_per_node=4", *layouts]
    status, script, errors = launch(file, "--nodes", 1, "--dry-run", *given)
    assert (status, errors) == (0, "")
    assert ("CUDA_DEVICE_MAX_CONNECTIONS=1 " in script) == is_set
    site = (ROOT / "slurm" / "env.sh").read_text()
    assert "CUDA_DEVICE_MAX_CONNECTIONS:=" not in site and "export CUDA_DEVICE" not in site


def test_it_refuses_before_torch_is_loaded_and_a_forecast_loads_nothing_more(tmp_path):
    """The forecast lays out rollouts and asks the estimator for its rows."""
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(tmp_path / "run")})
    words = ("launch", file, "--nodes", "1", "--dry-run", *CPU)
    for wrong in ("sampling.denoising_steps=7.5", "parallel.tensor=3"):
        done = probe(*words, wrong, PATH="/nowhere")
        assert (done.returncode, done.stdout) == (2, "loaded:\n") and wrong in done.stderr
    done = probe(*words, PATH="/nowhere")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.endswith("\nloaded: torch\n")


def test_a_run_goes_on_and_one_that_is_finished_is_refused(launch, record, tmp_path):
    run = tmp_path / "run"
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(run)})
    leave_run(file, [], iteration=2)
    _, script, _ = launch(file, "--nodes", 1, "--dry-run", *CPU)
    assert f"# run       {run} (resumes after rl iteration 2 of 3)\n" in script
    status, printed, errors = launch(file, "--nodes", 1, "--dry-run", *CPU, "run.seed=1")
    assert (status, printed) == (2, "")
    assert f"run.dir={run} holds a run with run.seed=0, not 1, which may not change: " in errors
    assert "; choose another run.dir" in errors
    (run / "checkpoints" / "latest").unlink()
    run.rename(tmp_path / "run.1")
    leave_run(file, [], iteration=3)
    status, printed, errors = launch(file, "--nodes", 1, "--dry-run", *CPU)
    assert (status, printed) == (2, "")
    assert errors == (
        f"agrpo: error: run.dir={run} is finished; add --restart to move it away and run it again\n"
    )
    status, script, _ = launch(file, "--nodes", 1, "--dry-run", "--restart", *CPU)
    assert status == 0 and f"# run       {run} (new)\n" in script
    record(script)
    assert (tmp_path / "run.2" / "checkpoints" / "rl-000003").is_dir(), "moved, not deleted"
    assert [path.name for path in run.iterdir()] == ["launch"]


WRONG = {
    "--nodes 0 is below 1; give the number of nodes": ["--nodes", 0],
    "launch.ranks_per_node=9 is over launch.gpus_per_node=8, and each rank needs its own GPU; "
    "use at most 8, or launch.gpus_per_node=0 for CPUs": ["launch.ranks_per_node=9"],
    "launch.time=soon is not a time; write minutes, hours:minutes:seconds such as 04:00:00, or "
    "days-hours:minutes:seconds": ["launch.time=soon"],
    "launch.grace=300 is not shorter than launch.time=5, 300 seconds; lower it": ["launch.time=5"],
    "launch.options=-x is not an option; write --name=value": ["launch.options=[-x]"],
    "launch.options=--time=5 is set elsewhere; use launch.time": ["launch.options=[--time=5]"],
    "parallel.tensor=3 does not divide model.num_attention_heads=2; use "
    "parallel=tp2-pp1-cp1-dp4, the nearest layout that fits": ["parallel=tp3"],
    "launch.gpu_memory=1 is under the 4.1 GiB of the fullest rank at parallel=tp1-pp1-cp1-dp8; "
    "split the model over more ranks (python tools/layouts.py FILE --ranks 8 compares layouts)": [
        "model.hidden_size=4096",
        "launch.gpu_memory=1",
    ],
    "tokenizer.path=/nowhere does not exist; give a sentencepiece .model file, a Hugging Face "
    "directory, or null for the built-in characters": ["tokenizer.path=/nowhere"],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_run_is_one_line_and_leaves_nothing(message, launch, no_slurm, tmp_path):
    run = tmp_path / "run"
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(run)})
    status, printed, errors = launch(file, "--nodes", 1, *WRONG[message])
    assert (status, printed, errors) == (2, "", f"agrpo: error: {message}\n")
    assert not run.exists()


def test_without_slurm_nothing_is_submitted(launch, no_slurm, tmp_path):
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(tmp_path / "run")})
    status, printed, errors = launch(file, "--nodes", 1, *CPU)
    assert (status, printed) == (2, "")
    assert errors == (
        "agrpo: error: sbatch is not on PATH; submit from a machine of the cluster, or add "
        "--dry-run to see the job\n"
    )


def test_memory_that_is_nearly_full_is_warned_of(launch, no_slurm, tmp_path):
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(tmp_path / "run")})
    big = ["model.hidden_size=4096", "launch.gpu_memory=4.3"]
    _, script, _ = launch(file, "--nodes", 1, "--dry-run", *big)
    assert "GiB in the fullest rank, 96 % of 4.3 GiB: weights" in script
    assert "# warning   memory is over 90 % of launch.gpu_memory, and" in script
    _, script, _ = launch(file, "--nodes", 1, "--dry-run", *big, *CPU)
    assert "warning   memory" not in script, "without GPUs there is no limit"


GRID = ("--sweep", "optimizer.learning_rate=[1e-4, 3e-4]", "run.seed=[0, 1]")


@pytest.mark.parametrize("name", ["sweep", "it's a $weep"])
def test_a_sweep_submits_an_array_and_its_table(name, launch, record, shellcheck, tmp_path):
    directory = tmp_path / name
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(directory)})
    status, script, errors = launch(file, "--nodes", 1, "--dry-run", *CPU, *GRID)
    assert (status, errors) == (0, "")
    shellcheck(script)
    assert f"# sweep     {directory}: 4 members, 4 of them to run\n" in script
    assert "#   02 optimizer.learning_rate=3e-4 run.seed=0: new\n" in script
    (array, table), printed = record(script)
    assert printed == ["4711;cluster"] * 2
    assert array[-2:] == [str(ROOT / "slurm" / "sweep.sbatch"), str(directory)]
    assert "--array=0-3" in array and f"--output={directory}/launch/%A_%a.log" in array
    assert "--dependency=afterany:4711" in table and "--ntasks=1" in table
    wrapped = [word for word in table if word.startswith("--wrap=")]
    assert len(wrapped) == 1 and "--exclusive" not in table
    made = subprocess.run(["/bin/sh", "-c", wrapped[0].removeprefix("--wrap=")], cwd=ROOT)
    assert made.returncode == 0 and (directory / "summary.md").is_file()
    sweep = read_sweep(directory)
    assert sweep.members["03"] == {"optimizer.learning_rate": "3e-4", "run.seed": 1}


def test_a_sweep_goes_on_with_the_members_that_are_not_finished(launch, record, tmp_path):
    directory = tmp_path / "sweep"
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(directory)})
    _, script, _ = launch(file, "--nodes", 1, "--dry-run", *CPU, *GRID)
    record(script)
    sweep = read_sweep(directory)
    for name, iteration in (("01", 3), ("03", 2)):
        leave_run(*_split(sweep.arguments(directory, name)), iteration=iteration)
    (*_, again), _ = _launch_again(launch, file)
    assert again == "0,2-3"
    for name in ("00", "02"):
        leave_run(*_split(sweep.arguments(directory, name)), iteration=3)
    (_, state, array), _ = _launch_again(launch, file)
    assert (state, array) == ("resumes after rl iteration 2 of 3", "3")


def _split(words):
    return words[0], words[1:]


def _launch_again(launch, file):
    """Return what is said of the last member, and the members that are submitted."""
    _, script, _ = launch(file, "--nodes", 1, "--dry-run", *CPU, *GRID)
    state = script.partition("\n#   03 ")[2].partition(": ")[2].partition("\n")[0]
    array = script.partition("--array=")[2].partition(" ")[0]
    return ("", state, array), script


def test_a_sweep_is_refused_whole_and_the_member_is_named(launch, no_slurm, tmp_path):
    directory = tmp_path / "sweep"
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(directory)})

    def refused(*arguments):
        status, printed, errors = launch(file, "--nodes", 1, "--dry-run", *CPU, *arguments)
        assert (status, printed) == (2, "") and errors.count("\n") == 1
        return errors.removeprefix("agrpo: error: ").removesuffix("\n")

    assert refused("--sweep", "run.seed=[0, 1]", "sampling.block_length=[8, 6]") == (
        "member 01 run.seed=0 sampling.block_length=6: sampling.block_length=6 does not divide "
        "sampling.completion_length=16; use 4 or 8"
    )
    assert refused("--sweep", "run.sed=[0, 1]") == (
        "member 00 run.sed=0: run.sed is not a setting; did you mean run.seed?"
    )
    assert not directory.exists()
    directory.mkdir()
    (directory / SWEEP).write_text("file: a\noverrides: []\nmembers: {'00': {run.seed: 0}}\n")
    assert "holds another sweep" in refused("--sweep", "run.seed=[0, 1]")
    assert refused() == f"run.dir={directory} holds a sweep; choose another run.dir"
    (directory / SWEEP).unlink()
    leave = leave_run(file, [f"run.dir={directory / 'x'}"], iteration=1)
    (leave / "config.yaml").rename(directory / "config.yaml")
    assert "holds a run, not a sweep" in refused("--sweep", "run.seed=[0, 1]")
