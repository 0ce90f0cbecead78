"""The check of a GPU, rehearsed without one: it runs, says what it is, and judges figures right."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agrpo_megatron.hardware.workspace import LIMIT, training_workspace
from tools.gpu_jobs import JOBS, by_process
from tools.gpu_needs import missing
from tools.gpu_verdict import NO_START, NOT_REACHED, RIGHT, SLOW, WRONG

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / "tools" / f"{name}.sh" for name in ("gpu_check", "gpus_check")]
SCRIPT = SCRIPTS[0]
sys.path.append(str(ROOT / "tools"))  # where the tools import one another from
report = importlib.import_module("gpu_report")
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


def _record(*, rehearsal=False, suite=SUITE, planned=(), **jobs):
    return {
        "schema": report.SCHEMA,
        "rehearsal": rehearsal,
        "date": "2026-01-01 00:00 UTC",
        "commit": "abc",
        "command": "tools/gpu_check.sh",
        "seconds": 1.0,
        "machine": {"gpu": "H100", "torch": "2.11.0"},
        "suite": suite,
        "planned": list(planned),
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
    found = report.finish(_record(**MEASURED))
    states = [target["state"] for target in found["targets"]]
    assert states == ["met", "missed", "met", "met", "missed", "met"]
    assert found["ratios"]["fp8 blockwise / bf16, update"] == 1.25
    assert found["ratios"]["te bf16 update / bf16 ceiling"] == 0.5
    assert "te / local in bf16, update" not in found["ratios"]


def test_what_was_not_measured_meets_nothing():
    nothing = report.finish(_record(suite=report.read_suite(None)))
    assert {target["state"] for target in nothing["targets"]} == {report.NOT_MEASURED}
    assert nothing["verdict"]["status"] == NOT_REACHED
    assert nothing["verdict"]["not reached"][0] == "the tests did not run"
    rehearsed = report.finish(_record(rehearsal=True, **FAST))
    assert {target["state"] for target in rehearsed["targets"]} == {report.REHEARSED}
    assert rehearsed["verdict"]["status"] == RIGHT
    assert "REHEARSAL" in report.table(rehearsed) and "REHEARSAL" not in report.table(nothing)


FAST = {
    "ceiling": MEASURED["ceiling"],
    "te bf16": {"rollout": _speed(100.0), "update": _speed(100.0, 400.0)},
    "te fp8 blockwise": {"rollout": _speed(130.0), "update": _speed(130.0)},
    "te bf16 batch-invariant": {"refused": "kernels.batch_invariant=true needs flash attention"},
}
ALIKE = {**SUITE, "figures": {"mismatch/bf16/mean": 1.004, "mismatch/fp8 blockwise/mean": 1.02}}
FAILED = {"test": "t", "reason": "AssertionError: 1 < 0"}
ONE_LEFT = {"not_reached": 1, "collected": 4}
SLOWLY = {"te fp8 blockwise": {"rollout": _speed(130.0), "update": _speed(110.0)}}
DIED = {"local bf16": {"failed": "failed with status 1; see gpu_check.log"}}
CUT = {"local fp32": {"cut": "cut: no time was left"}}
VERDICTS = {  # tests, jobs, status, and a part of the reasons
    "all is right": ({}, {}, RIGHT, []),
    "slow alone": ({}, SLOWLY, SLOW, ["slow: FP8 blockwise updates"]),
    "a failed test": ({"failed": [FAILED]}, {}, WRONG, ["wrong: test t"]),
    "a failed test, slowly": ({"failed": [FAILED]}, SLOWLY, WRONG, ["wrong: test t", "slow: FP8"]),
    "a job that died": ({}, DIED, WRONG, ["wrong: local bf16: failed with status 1"]),
    "too large a mismatch": (SUITE, {}, WRONG, ["wrong: mismatch in FP8 blockwise", "1.04"]),
    "a job cut": ({}, CUT, NOT_REACHED, ["not reached: local fp32: cut"]),
    "a job cut, slowly": ({}, CUT | SLOWLY, NOT_REACHED, ["not reached: local fp32", "slow: FP8"]),
    "a test not reached": (ONE_LEFT, {}, NOT_REACHED, ["not reached: 1 of 4 tests"]),
    "a job cut and a test failed": ({"failed": [FAILED]}, CUT, WRONG, ["wrong: test t", "not re"]),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_exit_status_tells_wrong_from_not_reached_from_slow(name):
    suite, jobs, status, reasons = VERDICTS[name]
    found = report.finish(_record(suite={**ALIKE, **suite}, **{**FAST, **jobs}))
    assert found["verdict"]["status"] == status
    table = report.table(found)
    assert f"**Exit status {status}: {found['verdict']['meaning']}.**" in table
    assert all(reason in table for reason in reasons)


def test_a_job_that_never_began_was_not_reached():
    """The check itself was killed before it."""
    found = report.finish(_record(suite=ALIKE, planned=[*FAST, "local bf16"], **FAST))
    assert found["verdict"]["status"] == NOT_REACHED
    assert found["verdict"]["not reached"] == ["local bf16: not begun"]


def test_statuses_are_documented_as_they_are():
    statuses = [RIGHT, WRONG, NO_START, SLOW, NOT_REACHED]
    assert statuses == [0, 1, 2, 3, 4]
    for script in SCRIPTS:
        helped = _run(script, "--help").stdout
        words = ["right", "wrong", "it could not start", "slow", "not reached"]
        for status, word in zip(statuses, words, strict=True):
            lines = [line for line in helped.splitlines() if line.startswith(f"  {status}  ")]
            is_used = script == SCRIPT or status != SLOW
            assert len(lines) == is_used and (not is_used or word in lines[0] or status == RIGHT)


def test_the_table_holds_every_job_and_says_what_failed():
    lines = report.table(report.finish(_record(**MEASURED))).splitlines()
    (update,) = [line for line in lines if line.startswith("| te bf16 | update")]
    assert update == "| te bf16 | update | 100 | 400.0 | 50.0% | 50.0 | 90.0, 110.0 ms |"
    assert any(line.startswith("| local bf16 | failed with status 1") for line in lines)
    assert any(line.startswith("| local fp32 | cut") for line in lines)
    start = next(number for number, line in enumerate(lines) if line.startswith("| kernels |"))
    speeds = lines[start : lines.index("", start)]
    assert len(speeds) == 8 and {line.count("|") for line in speeds} == {8}


EVENTS = [
    {"event": "collected", "count": 5},
    {"event": "start", "test": "a"},
    {"event": "end", "test": "a", "outcome": "passed", "seconds": 1, "reason": ""}
    | {"figures": {"x": 2.0}},
    {"event": "start", "test": "b"},
    {"event": "start", "test": "c"},
    {"event": "end", "test": "c", "outcome": "skipped", "seconds": 0, "reason": "no te"}
    | {"figures": {}},
]


def _suite(folder, *more):
    file = folder / "tests.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in [*EVENTS, *more]))
    return report.read_suite(file)


def test_a_test_that_took_its_process_down_has_failed(tmp_path):
    suite = _suite(tmp_path)
    assert suite["passed"] == 1 and suite["not_reached"] == 2 and suite["figures"] == {"x": 2.0}
    assert [test["test"] for test in suite["failed"]] == ["b"]
    assert suite["skipped"] == [{"test": "c", "reason": "no te"}]
    found = report.finish(_record(suite=suite))
    (last,) = [t for t in found["targets"] if t["target"].startswith("tests")]
    assert last["state"] == "missed" and last["found"] == 1
    assert found["verdict"]["status"] == WRONG


def test_a_test_that_was_running_at_the_end_of_the_time_was_not_reached(tmp_path):
    suite = _suite(tmp_path, {"event": "start", "test": "d"}, {"event": "cut"})
    assert [test["test"] for test in suite["failed"]] == ["b"] and suite["not_reached"] == 2
    suite = _suite(tmp_path, {"event": "cut"})  # none was running
    assert [test["test"] for test in suite["failed"]] == ["b"] and suite["not_reached"] == 2


def test_tests_that_do_not_load_are_wrong(tmp_path):
    file = tmp_path / "tests.jsonl"
    file.write_text(json.dumps({"event": "broken", "status": 2}) + "\n")
    suite = report.read_suite(file)
    assert suite["ran"] and suite["failed"][0]["reason"].startswith("pytest ended with status 2")
    assert report.finish(_record(suite=suite, **FAST))["verdict"]["status"] == WRONG


def test_jobs_with_the_same_kernels_share_a_process():
    shared = [[job.name for job in jobs] for jobs in by_process(JOBS)]
    assert shared[0][:3] == ["ceiling", "te bf16", "graphs te bf16"]
    assert [name for jobs in shared for name in jobs] == [job.name for job in JOBS]
    for jobs in shared:
        switches = [name for name in jobs if "deterministic" in name or "invariant" in name]
        assert not switches or len(jobs) == 1  # they set the whole process


def test_the_deterministic_job_fits_into_memory():
    model = importlib.import_module("gpu_model")
    (job,) = [job for job in JOBS if job.name == "te bf16 deterministic"]
    scale = replace(model.LLADA_8B, rows=model.LLADA_8B.rows // job.fewer)
    settings = model.scale_settings(scale, *job.overrides)
    assert settings.train.token_budget == scale.tokens == 2048
    assert training_workspace(settings, scale.tokens) <= LIMIT
    whole = model.scale_settings(model.LLADA_8B, *job.overrides)
    assert training_workspace(whole, model.LLADA_8B.tokens) > LIMIT


def test_what_is_missing_is_told_with_the_command_that_gets_it(monkeypatch):
    has = importlib.import_module("tools.gpu_needs")
    monkeypatch.setattr(has, "_has", lambda package: package not in ("psutil", "numpy"))
    lines = missing("gpus_check", "some/wheels")
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (psutil,) = [pin for pin in pins if pin.startswith("psutil==")]
    assert [line.partition(" is not installed; ")[0] for line in lines] == ["numpy", "psutil"]
    assert f"pip install {psutil}, or on a machine with network" in lines[1]
    assert "tools/gpus_check.sh --collect --wheels some/wheels" in lines[1]
    told = "\n".join(has.transformer_engine("some/wheels"))
    assert (
        "pip wheel --no-deps --no-build-isolation -w some/wheels transformer_engine_torch" in told
    )
    install = (ROOT / "docs" / "install.md").read_text()
    assert f"transformer_engine_torch=={has.TE_VERSION}" in install


@pytest.mark.slow
def test_the_timing_is_rehearsed_on_a_cpu(tmp_path):
    done = _run(sys.executable, "tools/gpu_check.py", "--rehearse", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert set(record) == {
        *("schema", "rehearsal", "date", "commit", "command", "seconds", "machine", "suite"),
        *("planned", "jobs", "ratios", "targets", "verdict"),
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
    assert record["verdict"]["not reached"] == ["the tests did not run"]
    (tmp_path / "tests.jsonl").write_text("\n".join(json.dumps(each) for each in EVENTS))
    command = [sys.executable, "tools/gpu_check.py", "--out", tmp_path]
    judged = _run(*command, "--suite", tmp_path / "tests.jsonl")
    assert judged.returncode == WRONG and "wrong: test b" in judged.stdout


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
    suite = report.read_suite(results)
    assert done.returncode == 0, done.stdout[-6000:]
    assert suite["passed"] >= 10 and not suite["failed"] and not suite["not_reached"]
    assert all(test["reason"] for test in suite["skipped"])
    assert suite["passed"] + len(suite["skipped"]) == suite["collected"]
    assert suite["figures"]["mismatch/local bf16/mean"] >= 1
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-1]) + "\n")  # the last test never ended
    again = _run(*command, **given)
    assert again.returncode == 5 and "deselected" in again.stdout
    after = report.read_suite(results)
    assert len(after["failed"]) == 1 and after["collected"] == suite["collected"]


def test_without_a_gpu_all_is_skipped_and_told():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = _run(*command)
    assert done.returncode == 0, done.stdout
    assert "tests need a GPU and were skipped: tools/gpu_check.sh" in done.stdout
    assert " passed" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_needs_a_gpu_and_knows_its_arguments(script, tmp_path):
    no_gpu = _run(script, "--out", tmp_path / "out", PATH=_path_without_gpu(tmp_path))
    assert no_gpu.returncode == NO_START
    assert no_gpu.stderr.count("\n") <= 2 and "--rehearse" in no_gpu.stderr
    for words in (["--fast"], ["--fast", "1"], ["--out"]):
        unknown = _run(script, *words)
        assert unknown.returncode == NO_START
        assert f"error: unknown argument {words[0]}" in unknown.stderr
    helped = _run(script, "--help")
    assert helped.returncode == 0 and helped.stdout.startswith("Verify ")
    assert "set -" not in helped.stdout


def _path_without_gpu(folder):
    """Return a PATH whose nvidia-smi finds nothing."""
    (folder / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_the_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; `make slurm` installs it")
    done = _run("shellcheck", "-x", *SCRIPTS)
    assert done.returncode == 0, done.stdout
