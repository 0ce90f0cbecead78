"""The check of a GPU, rehearsed without one: it runs, says what it is, and judges figures right."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu_jobs import JOBS
from tools.gpu_report import NOT_MEASURED, REHEARSED, finish, read_suite, table

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "gpu_check.sh"
TE_PYTHON = ROOT / ".venv-te" / "bin" / "python"  # as `make te` makes it
SUITE = {
    "ran": True,
    "collected": 3,
    "passed": 3,
    "failed": [],
    "skipped": [],
    "not_reached": 0,
    "seconds": 1.0,
    "figures": {"mismatch/bf16/mean": 1.004, "mismatch/fp8 blockwise/mean": 1.04},
}


def _run(*command, timeout=300, **environment):
    plain = {key: v for key, v in os.environ.items() if not key.startswith("AGRPO")}
    plain |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**plain, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def _speed(tokens_per_second, tflops=1.0):
    return {
        "tokens": 8192,
        "seconds": 0.1,
        "spread": [0.09, 0.11],
        "tokens_per_second": tokens_per_second,
        "tflops": tflops,
        "peak_gib": 50.0,
    }


def _record(*, rehearsal=False, suite=SUITE, **jobs):
    return {
        "schema": 1,
        "rehearsal": rehearsal,
        "date": "2026-01-01 00:00 UTC",
        "commit": "abc",
        "command": "tools/gpu_check.sh",
        "seconds": 1.0,
        "machine": {"gpu": "H100", "torch": "2.11.0"},
        "suite": suite,
        "jobs": jobs,
    }


MEASURED = {
    "ceiling": {"ceilings": {"size": 8192, "bf16": 800.0, "fp8": 1500.0, "fp32": None}},
    "te bf16": {"rollout": _speed(100.0), "update": _speed(100.0, 400.0)},
    "te fp8 blockwise": {"rollout": _speed(119.0), "update": _speed(125.0)},
    "graphs te bf16": {"graphs": [{"rows": 1, "graphs": True, **_speed(1.0)}]},
    "local bf16": {"failed": "failed with status 1"},
    "local fp32": {"cut": "cut: no time was left"},
}


def test_targets_are_met_or_missed_by_the_figures():
    found = finish(_record(**MEASURED))
    states = [target["state"] for target in found["targets"]]
    assert states == ["met", "missed", "met", "met", "missed", "met"]
    assert found["ratios"]["fp8 blockwise / bf16, update"] == 1.25
    assert found["ratios"]["te bf16 update / bf16 ceiling"] == 0.5
    assert "te / local in bf16, update" not in found["ratios"]


def test_what_was_not_measured_meets_nothing():
    nothing = finish(_record(suite=read_suite(Path("nowhere"))))
    assert {target["state"] for target in nothing["targets"]} == {NOT_MEASURED}
    rehearsed = finish(_record(rehearsal=True, **MEASURED))
    assert {target["state"] for target in rehearsed["targets"]} == {REHEARSED}
    assert "REHEARSAL" in table(rehearsed) and "REHEARSAL" not in table(nothing)


def test_the_table_holds_every_job_and_says_what_failed():
    lines = table(finish(_record(**MEASURED))).splitlines()
    (update,) = [line for line in lines if line.startswith("| te bf16 | update")]
    assert update == "| te bf16 | update | 100 | 400.0 | 50.0% | 50.0 | 90.0, 110.0 ms |"
    assert any(line.startswith("| local bf16 | failed with status 1") for line in lines)
    assert any(line.startswith("| local fp32 | cut") for line in lines)
    start = next(number for number, line in enumerate(lines) if line.startswith("| kernels |"))
    speeds = lines[start : lines.index("", start)]
    assert len(speeds) == 8 and {line.count("|") for line in speeds} == {8}


def test_a_test_that_took_its_process_down_has_failed(tmp_path):
    file = tmp_path / "tests.jsonl"
    events = [
        {"event": "collected", "count": 5},
        {"event": "start", "test": "a"},
        {"event": "end", "test": "a", "outcome": "passed", "seconds": 1, "reason": ""}
        | {"figures": {"x": 2.0}},
        {"event": "start", "test": "b"},
        {"event": "start", "test": "c"},
        {"event": "end", "test": "c", "outcome": "skipped", "seconds": 0, "reason": "no te"}
        | {"figures": {}},
    ]
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    suite = read_suite(file)
    assert suite["passed"] == 1 and suite["not_reached"] == 2 and suite["figures"] == {"x": 2.0}
    assert [test["test"] for test in suite["failed"]] == ["b"]
    assert suite["skipped"] == [{"test": "c", "reason": "no te"}]
    (last,) = [
        t for t in finish(_record(suite=suite))["targets"] if t["target"].startswith("tests")
    ]
    assert last["state"] == "missed" and last["found"] == 3


@pytest.mark.slow
def test_the_timing_is_rehearsed_on_a_cpu(tmp_path):
    done = _run(sys.executable, "tools/gpu_check.py", "--rehearse", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert set(record) == {
        *("schema", "rehearsal", "date", "commit", "command", "seconds", "machine", "suite"),
        *("jobs", "ratios", "targets"),
    }
    assert record["rehearsal"] and record["machine"]["torch"] and record["commit"]
    jobs = record["jobs"]
    assert set(jobs) == {job.name for job in JOBS}
    assert all(jobs["ceiling"]["ceilings"][name] > 0 for name in ("bf16", "fp32"))
    for name in ("local bf16", "local fp32"):
        for part in ("rollout", "update"):
            speed = jobs[name][part]
            least, most = speed["spread"]
            assert 0 < least <= speed["seconds"] <= most
            assert speed["tokens_per_second"] == pytest.approx(speed["tokens"] / speed["seconds"])
    assert all("refused" in jobs[job.name] for job in JOBS if "te" in job.name.split())
    assert "local bf16 / local fp32, update" in record["ratios"]
    assert (tmp_path / "gpu_check.md").read_text() == done.stdout
    assert "No figure here is a measurement" in done.stdout


def test_jobs_that_no_time_is_left_for_are_told_as_cut(tmp_path):
    command = [sys.executable, "tools/gpu_check.py", "--rehearse", "--seconds", "1"]
    done = _run(*command, "--out", tmp_path)
    jobs = json.loads((tmp_path / "gpu_check.json").read_text())["jobs"]
    assert done.returncode == 0 and len(jobs) == len(JOBS)
    assert all(job["cut"].startswith("cut") for job in jobs.values())


@pytest.mark.slow
def test_the_tests_are_rehearsed_and_go_on_where_they_were_cut(tmp_path):
    """With Transformer Engine where `make te` put it, else what needs none."""
    python = TE_PYTHON if TE_PYTHON.exists() else sys.executable
    results = tmp_path / "tests.jsonl"
    command = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    given = {"AGRPO_REHEARSE_GPU": "1", "AGRPO_GPU_RESULTS": str(results)}
    done = _run(*command, timeout=1200, **given)
    suite = read_suite(results)
    assert done.returncode == 0, done.stdout[-6000:]
    assert suite["passed"] >= 10 and not suite["failed"] and not suite["not_reached"]
    assert all(test["reason"] for test in suite["skipped"])
    assert suite["passed"] + len(suite["skipped"]) == suite["collected"]
    assert suite["figures"]["mismatch/local bf16/mean"] >= 1
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-1]) + "\n")  # the last test never ended
    again = _run(*command, **given)
    assert again.returncode == 5 and "deselected" in again.stdout
    after = read_suite(results)
    assert len(after["failed"]) == 1 and after["collected"] == suite["collected"]


def test_without_a_gpu_all_is_skipped_and_told():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = _run(*command)
    assert done.returncode == 0, done.stdout
    assert "tests need a GPU and were skipped: tools/gpu_check.sh" in done.stdout
    assert " passed" not in done.stdout.splitlines()[-1]


def test_the_script_needs_a_gpu_and_knows_its_arguments(tmp_path):
    no_gpu = _run(SCRIPT, "--out", tmp_path / "out", PATH=_path_without_gpu(tmp_path))
    assert no_gpu.returncode == 2
    assert no_gpu.stderr.count("\n") <= 2 and "--rehearse" in no_gpu.stderr
    unknown = _run(SCRIPT, "--fast")
    assert unknown.returncode == 2 and "unknown argument --fast" in unknown.stderr
    helped = _run(SCRIPT, "--help")
    assert helped.returncode == 0 and helped.stdout.startswith("Verify this working tree")
    assert "set -" not in helped.stdout


def _path_without_gpu(folder):
    """Return a PATH whose nvidia-smi finds nothing."""
    (folder / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_the_script_is_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; `make slurm` installs it")
    done = _run("shellcheck", SCRIPT)
    assert done.returncode == 0, done.stdout
