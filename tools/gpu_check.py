"""Time rollouts and updates at LLaDA-8B's layer shapes on one GPU; write a JSON file and a table.

    tools/gpu_check.sh                          tests and timing together: run this first
    python tools/gpu_check.py --out DIR         the timing alone
    python tools/gpu_check.py --rehearse        all of it at tiny sizes on a CPU, in a minute

A forward is a packed micro-batch of 8192 tokens (16 rows, prompts of 192 and 320 tokens, 256 of
completion), through 6 of LLaDA-8B's 32 layers, its embedding and its head. `rollout` is a
denoising step: the forward, and drawing the 32 tokens that it fixes. `update` is what training
does with 8 such micro-batches: forward, backward, clipping and Adam. First the GPU's ceiling is
measured: products of random 8192 x 8192 matrices. FLOPs are those of `scaling/flops.py`, three
times for updates; nothing recomputed, padded or masked is counted.

Figures are medians by CUDA events after warming up. A separate process measures each row of the
table. Rows that do not fit into --seconds are cut, from the end, and reported. DIR gets
gpu_check.json, gpu_check.md and gpu_check.log; the first two are rewritten after each measurement.
Targets are reported as met or missed; the exit status does not depend on them.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_jobs import JOBS
from gpu_report import SCHEMA, finish, read_suite, table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "flash-attn-3")
LEAST = 15.0  # seconds; a job with less time left is not started


def main() -> int:
    """Measure as much as the time allows and record it; returns the exit status."""
    arguments = _arguments()
    if arguments.job:
        return _measure(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = _begin(arguments)
    _write(record, arguments.out)
    started = time.monotonic()
    for names, limit in _plan(arguments):
        left = arguments.seconds - (time.monotonic() - started)
        if left < LEAST:
            found = {name: {"cut": "cut: no time was left"} for name in names}
        else:
            found = _run(names, min(limit, left), arguments)
        for name, result in found.items():
            record["machine"].update(result.pop("machine", {}))
            record["jobs"][name] = result
        record["seconds"] = round(time.monotonic() - started, 1)
        _write(record, arguments.out)
    print((arguments.out / "gpu_check.md").read_text(), end="")
    return 0


def _plan(arguments: argparse.Namespace) -> list[tuple[list[str], float]]:
    """Return the jobs of each process, and its limit in seconds; a rehearsal has one process."""
    jobs = [job for job in JOBS if not arguments.only or job.name in arguments.only]
    if arguments.rehearse:
        return [([job.name for job in jobs], sum(job.seconds for job in jobs))]
    return [([job.name], job.seconds) for job in jobs]


def _run(names: list[str], limit: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run jobs in a separate process; returns each job's figures, or how it failed."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        results = Path(folder) / "results"
        results.touch()
        command = [sys.executable, __file__, "--results", str(results)]
        command += [word for name in names for word in ("--job", name)]
        command += ["--rehearse"] if arguments.rehearse else []
        why = ""
        with (arguments.out / "gpu_check.log").open("a") as log:
            print(f"\n== {', '.join(names)}", file=log, flush=True)
            try:
                done = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env=_environment()
                )
                why = f"failed with status {done.returncode}; see gpu_check.log"
            except subprocess.TimeoutExpired:
                why = f"cut: not done within {limit:.0f} s"
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    found = {line["name"]: line["result"] for line in lines}
    return {name: found.get(name, {"failed": why}) for name in names}


def _measure(arguments: argparse.Namespace) -> int:
    """Run as the process of some jobs: append each result to a file as a line."""
    from gpu_timing import run_job

    jobs = {job.name: job for job in JOBS}
    for name in arguments.job:
        result = run_job(jobs[name], is_rehearsal=arguments.rehearse)
        with arguments.results.open("a") as file:
            file.write(json.dumps({"name": name, "result": result}) + "\n")
    return 0


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def _begin(arguments: argparse.Namespace) -> dict[str, Any]:
    machine: dict[str, Any] = {"python": sys.version.split()[0], "driver": _driver()}
    for name in PACKAGES:
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            machine[name] = None
    return {
        "schema": SCHEMA,
        "rehearsal": arguments.rehearse,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": arguments.commit or _commit(),
        "command": arguments.command or shlex.join(sys.argv),
        "seconds": 0.0,
        "machine": machine,
        "suite": read_suite(arguments.suite) if arguments.suite else read_suite(Path("nowhere")),
        "jobs": {},
    }


def _write(record: dict[str, Any], out: Path) -> None:
    finished = finish(record)
    (out / "gpu_check.json").write_text(json.dumps(finished, indent=1) + "\n")
    (out / "gpu_check.md").write_text(table(finished))


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str:
    described = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40")
    note = ROOT / ".gpu" / "commit"  # for a machine that has only the files
    return described or (note.read_text().strip() if note.exists() else "unknown")


def _output(*command: str) -> str | None:
    """Return the first line of a command's output; None if it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), metavar="DIR")
    parser.add_argument("--seconds", type=float, default=270.0, help="time for all of it (270)")
    parser.add_argument("--only", action="append", metavar="NAME", help="these rows alone")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, also on a CPU; measures nothing"
    )
    parser.add_argument("--suite", type=Path, metavar="FILE", help="results of the tests")
    parser.add_argument("--commit", help="the checked commit, without git")
    parser.add_argument("--command", help="the command that started this")
    # Of the process of a job:
    parser.add_argument("--job", action="append", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
