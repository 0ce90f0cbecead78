"""Time rollouts and updates at LLaDA-8B's layer shapes on one GPU; write a JSON file and a table.

    tools/gpu_check.sh                          timing and tests together: run this first
    python tools/gpu_check.py --out DIR         the timing alone
    python tools/gpu_check.py --rehearse        all of it at tiny sizes on a CPU, in a minute

A forward is a packed micro-batch of 8192 tokens (16 rows, prompts of 192 and 320 tokens, 256 of
completion), through 6 of LLaDA-8B's 32 layers, its embedding and its head. `rollout` is a
denoising step: the forward, and drawing the 32 tokens that it fixes. `update` is what training
does with 8 such micro-batches: forward, backward, clipping and Adam. First the GPU's ceiling is
measured: products of random 8192 x 8192 matrices. FLOPs are those of `scaling/flops.py`, three
times for updates; nothing recomputed, padded or masked is counted.

Figures are medians by CUDA events after warming up. Rows of the table with the same kernels share
a process; a row that ends its process does not take the others along. Rows that do not fit into
--seconds are cut, from the end, and reported. DIR gets gpu_check.json, gpu_check.md and
gpu_check.log; the first two are rewritten after each row.

Exit status: 0 if it ran. With --suite it measures nothing: it adds the results of the tests to the
record of DIR, and its exit status is that of the whole check (tools/gpu_check.sh --help).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_jobs import JOBS, by_process
from gpu_processes import append_result, run_tasks
from gpu_record import ROOT, Record, begin, write
from gpu_report import SCHEMA, finish, read_suite, table

NAME, LOG = "gpu_check.json", "gpu_check.log"


def main() -> int:
    """Measure as much as the time allows and record it; returns the exit status."""
    arguments = _arguments()
    if arguments.job:
        return _measure(arguments)
    if arguments.suite:
        return _judge(arguments.out, arguments.suite)
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = tuple(job for job in JOBS if not arguments.only or job.name in arguments.only)
    record = begin(
        schema=SCHEMA,
        is_rehearsal=arguments.rehearse,
        commit=arguments.commit,
        command=arguments.command,
    )
    record |= {"suite": read_suite(None), "planned": [job.name for job in jobs], "jobs": {}}
    _write(record, arguments.out)
    started = time.monotonic()

    def left() -> float:
        return arguments.seconds - (time.monotonic() - started)

    def start(names: list[str], results: Path) -> list[subprocess.Popen]:
        return [_start(names, results, arguments)]

    for tasks in [jobs] if arguments.rehearse else by_process(jobs):
        patience = 10 if arguments.rehearse else 1
        for name, result in run_tasks(tasks, start, left=left, log=LOG, patience=patience):
            record["machine"].update(result.pop("machine", {}))
            record["jobs"][name] = result
            record["seconds"] = round(time.monotonic() - started, 1)
            _write(record, arguments.out)
    print((arguments.out / NAME).with_suffix(".md").read_text(), end="")
    return 0


def _judge(out: Path, suite: Path) -> int:
    """Add the results of the tests to the record; returns the exit status of the whole check."""
    record = json.loads((out / NAME).read_text())
    finished = _write({**record, "suite": read_suite(suite)}, out)
    print((out / NAME).with_suffix(".md").read_text(), end="")
    return finished["verdict"]["status"]


def _start(names: list[str], results: Path, arguments: argparse.Namespace) -> subprocess.Popen:
    """Start a process of some jobs."""
    command = [sys.executable, __file__, "--results", str(results)]
    command += [word for name in names for word in ("--job", name)]
    command += ["--rehearse"] if arguments.rehearse else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with (arguments.out / LOG).open("a") as log:
        print(f"\n== {', '.join(names)}", file=log, flush=True)
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )


def _measure(arguments: argparse.Namespace) -> int:
    """Run as the process of some jobs: append each result to a file as a line."""
    from gpu_timing import run_job

    jobs = {job.name: job for job in JOBS}
    for name in arguments.job:
        result = run_job(jobs[name], is_rehearsal=arguments.rehearse)
        append_result(arguments.results, name, result)
    return 0


def _write(record: Record, out: Path) -> Record:
    finished = finish(record)
    write(finished, out / NAME, table)
    return finished


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), metavar="DIR")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for all of it (300)")
    parser.add_argument("--only", action="append", metavar="NAME", help="these rows alone")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, also on a CPU; measures nothing"
    )
    parser.add_argument("--suite", type=Path, metavar="FILE", help="results of the tests, to add")
    parser.add_argument("--commit", help="the checked commit, without git")
    parser.add_argument("--command", help="the command that started this")
    # Of the process of some jobs:
    parser.add_argument("--job", action="append", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
