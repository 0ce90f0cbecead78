"""The `agrpo` command on a run: train it, resume it, restart it, look at it."""

import json
import shutil

import pytest
import yaml

from tests.cli.test_main import agrpo, probe, write_settings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return (run directory, settings file, what training printed) of a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    file = write_settings(folder / "tiny.yaml", run={"dir": str(folder / "run")})
    status, printed = agrpo(folder, "train", file)
    assert status == 0
    return folder / "run", file, printed


def test_training_prints_what_came_of_it_and_writes_the_report(run):
    run_dir, _, printed = run
    assert "held-out accuracy" in printed and f"next    agrpo sample {run_dir}" in printed
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert list(run_dir.glob("**/*.png"))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(row["grad_norm"] for row in rows if row["phase"] == "rl") > 0


def test_a_finished_run_is_not_run_again_and_a_changed_one_is_refused(run, tmp_path):
    run_dir, file, _ = run
    before = (run_dir / "metrics.jsonl").read_text()
    status, printed = agrpo(tmp_path, "train", file)
    assert status == 0 and f"{run_dir} is finished; add --restart" in printed
    done = probe("train", file, "optimizer.learning_rate=0.5")
    assert (done.returncode, done.stdout) == (2, "loaded:\n")
    assert "holds a run with optimizer.learning_rate=0.0001, not 0.5" in done.stderr
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_a_run_that_ended_early_says_why_it_is_finished(run, tmp_path):
    run_dir, file, _ = run
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    root = copy / "checkpoints"
    path = root / (root / "latest").read_text() / "progress.json"
    why = "accuracy is 1: train.stop_target=1"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stopped": why}))
    status, printed = agrpo(tmp_path, "train", file, f"run.dir={copy}")
    assert status == 0 and f"is finished ({why}); add --restart" in printed.replace("\n", " ")


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


def test_sample_shows_completions_and_the_order_they_were_written_in(run, tmp_path):
    run_dir, _, _ = run
    status, printed = agrpo(tmp_path, "sample", run_dir, "--trace", "-n", "2")
    assert status == 0
    assert printed.count("prompt      ") == printed.count("reward      ") == 2
    plain = agrpo(tmp_path, "sample", run_dir, "-n", "2")[1]
    assert len(printed) > len(plain) > 0
    chosen = agrpo(tmp_path, "sample", run_dir, "--prompt", "12", "--checkpoint", "sft-000040")
    assert chosen[0] == 0 and "prompt      12\n" in chosen[1]
    refused = probe("sample", run_dir, "--checkpoint", "rl-9")
    assert refused.returncode == 2
    assert "holds no checkpoint rl-9; it has rl-0000" in refused.stderr


def test_report_can_be_written_again(run, tmp_path):
    run_dir, _, _ = run
    page = run_dir / "report.html"
    page.unlink()
    status, printed = agrpo(tmp_path, "report", run_dir)
    assert status == 0 and str(page) in printed.splitlines()
    assert "held-out" in page.read_text().lower()
    figures = run_dir / "figures"
    figures.rename(run_dir / "kept")
    figures.touch()
    refused = probe("report", run_dir)
    assert refused.returncode == 2 and f"error: DIR={figures} cannot be written" in refused.stderr
    assert "Traceback" not in refused.stderr
    figures.unlink()
    (run_dir / "kept").rename(figures)
