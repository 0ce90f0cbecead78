"""The `agrpo` command on a run: train it, resume it, restart it, look at it."""

import json
import os
import shutil
import signal

import pytest
import yaml

from agrpo_megatron.cli.main import main
from agrpo_megatron.runs.log import RunLog
from tests.cli.test_main import agrpo, call, probe, write_settings
from tests.ranks import run_ranks


def _train(file, folder):
    return call(["train", file], folder, draws=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return (run directory, settings file, what training printed) of a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    file = write_settings(folder / "tiny.yaml", run={"dir": str(folder / "run")})
    status, printed = run_ranks(1, _train, file, folder)[0]
    assert status == 0
    return folder / "run", file, printed


def refusal(capsys, *arguments):
    """Return the line that refuses a command."""
    status, printed = main([str(argument) for argument in arguments]), capsys.readouterr()
    assert (status, printed.out, printed.err.count("\n")) == (2, "", 1)
    return printed.err


def test_training_prints_what_came_of_it_and_writes_the_report(run):
    run_dir, _, printed = run
    assert "held-out accuracy" in printed and f"next    agrpo sample {run_dir}" in printed
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert list(run_dir.glob("**/*.png"))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(row["grad_norm"] for row in rows if row["phase"] == "rl") > 0


def test_a_finished_run_is_not_run_again_and_a_changed_one_is_refused(run, tmp_path, capsys):
    run_dir, file, _ = run
    before = (run_dir / "metrics.jsonl").read_text()
    status, printed = agrpo(tmp_path, "train", file)
    assert status == 0 and f"{run_dir} is finished; add --restart" in printed
    done = probe("train", run_dir, "optimizer.adam_beta1=0.5")
    assert (done.returncode, done.stdout) == (2, "loaded:\n")
    assert "holds a run with optimizer.adam_beta1=0.9, not 0.5, which may not" in done.stderr
    fewer = refusal(capsys, "train", run_dir, "train.iterations=2")
    assert f"train.iterations=2: run.dir={run_dir} has finished 3 iterations" in fewer
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_a_run_that_ended_early_says_why_it_is_finished(run, tmp_path):
    run_dir, file, _ = run
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    root = copy / "checkpoints"
    path = root / (root / "latest").read_text() / "progress.json"
    done = {**json.loads(path.read_text()), "scores": {"accuracy": 1.0}}
    why = "accuracy is 1: train.stop_target=1"
    path.write_text(json.dumps({**done, "stopped": why}))
    target = ("train.stop_metric=accuracy", "train.stop_target=1.0")
    status, printed = agrpo(tmp_path, "train", copy, "train.iterations=5", *target)
    assert status == 0 and f"is finished ({why}); add --restart" in printed.replace("\n", " ")


def test_the_directory_of_a_run_goes_on_with_its_own_settings(run, tmp_path, capsys):
    """One more iteration of a finished run, from wherever it was moved to."""
    copy = shutil.copytree(run[0], tmp_path / "moved")
    status, printed = agrpo(tmp_path, "train", copy, "train.iterations=4")
    assert status == 0 and "from here on train.iterations: 3 -> 4" in printed
    assert (copy / "checkpoints" / "rl-000004").is_dir()
    change = {"phase": "rl", "iteration": 3, "key": "train.iterations", "old": 3, "new": 4}
    assert json.loads((copy / "changes.jsonl").read_text()) == change
    assert yaml.safe_load((copy / "config.yaml").read_text())["run"]["dir"] == str(copy)
    nothing = refusal(capsys, "train", tmp_path)
    assert f"{tmp_path} is a directory without config.yaml" in nothing
    other = refusal(capsys, "train", copy, "run.dir=elsewhere")
    assert f"run.dir=elsewhere: {copy} is the directory of the run to resume" in other


def test_restart_moves_the_earlier_run_aside(run, tmp_path):
    run_dir, file, _ = run
    copy = shutil.copytree(run_dir, tmp_path / "run")
    changes = (f"run.dir={copy}", "sft.iterations=1", "train.iterations=1", "run.seed=1")
    status, printed = agrpo(tmp_path, "train", file, *changes, "--restart")
    assert status == 0 and f"the earlier run is now {tmp_path / 'run.1'}" in printed
    now, earlier = (
        yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("run", "run.1")
    )
    assert (now["run"]["seed"], earlier["run"]["seed"]) == (1, 0)
    assert (tmp_path / "run.1" / "checkpoints" / "rl-000003").is_dir()


def _trained(arguments, printed, interrupt_after=None):
    """Run `agrpo train` in this process; press Ctrl-C once it has written so many lines."""
    own, written = RunLog.metrics, []

    def metrics(self, record):
        own(self, record)
        written.append(record)
        if len(written) == interrupt_after:
            os.kill(os.getpid(), signal.SIGINT)

    RunLog.metrics = metrics
    file = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(file, standard)
    return main(["train", *map(str, arguments)])


def test_ctrl_c_saves_and_the_same_command_goes_on(run, tmp_path):
    """Lines: sft 1-40, evaluation before, rl 1, ...: it stops after the first RL iteration."""
    file, run_dir, printed = run[1], tmp_path / "run", tmp_path / "printed"
    arguments = (file, f"run.dir={run_dir}", "sft.iterations=1")
    assert run_ranks(1, _trained, arguments, printed, 3) == [130]
    said = printed.read_text()
    assert "Ctrl-C: stopping and saving; press it again to end at once" in said
    assert f"interrupted by Ctrl-C; saved: run the same command, or `agrpo train {run_dir}`" in said
    assert (run_dir / "checkpoints" / "latest").read_text() == "rl-000001"
    assert run_ranks(1, _trained, (run_dir,), printed) == [0]
    assert "resuming after rl iteration 1" in printed.read_text()
    assert (run_dir / "checkpoints" / "latest").read_text() == "rl-000003"


def test_sample_shows_completions_and_the_order_they_were_written_in(run, tmp_path, capsys):
    run_dir, _, _ = run
    status, printed = agrpo(tmp_path, "sample", run_dir, "--trace", "-n", "2")
    assert status == 0
    assert printed.count("prompt      ") == printed.count("reward      ") == 2
    plain = agrpo(tmp_path, "sample", run_dir, "-n", "2")[1]
    assert len(printed) > len(plain) > 0
    chosen = agrpo(tmp_path, "sample", run_dir, "--prompt", "12", "--checkpoint", "sft-000040")
    assert chosen[0] == 0 and "prompt      12\n" in chosen[1]
    refused = refusal(capsys, "sample", run_dir, "--checkpoint", "rl-9")
    assert "holds no checkpoint rl-9; it has rl-0000" in refused


def test_report_can_be_written_again(run, tmp_path, capsys):
    run_dir, _, _ = run
    page = run_dir / "report.html"
    page.unlink()
    status, printed = agrpo(tmp_path, "report", run_dir)
    assert status == 0 and str(page) in printed.splitlines()
    assert "held-out" in page.read_text().lower()
    figures = run_dir / "figures"
    figures.rename(run_dir / "kept")
    figures.touch()
    assert f"error: DIR={figures} cannot be written" in refusal(capsys, "report", run_dir)
    figures.unlink()
    (run_dir / "kept").rename(figures)
