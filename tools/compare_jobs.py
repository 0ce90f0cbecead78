"""Run the jobs of a comparison, some at a time, each in a process of its own.

Processes are forked from a server that imported torch and Megatron-Core once: a run starts in
moments, and its end, however sudden, does not disturb the others.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from compare_plan import Job

from agrpo_megatron.reports.read import read_run
from agrpo_megatron.reports.text import duration

PHASES = {"start": ("sft",), "whole": ("sft", "rl")}  # by kind; of others RL alone
PRELOADED = ["agrpo_megatron.training.run", "agrpo_megatron.training.variance.command"]
FINISHED, FOUND, STOPPED, FAILED = "finished", "found", "stopped", "failed"
BATCHES, REPEATS = 4, 4  # of the measurement of variance, as `agrpo variance` has them


@dataclass(frozen=True)
class Outcome:
    """The end of a job."""

    state: str  # one of the four above; "found": an earlier attempt had finished it
    reason: str = ""
    seconds: float = 0.0


class Clock:
    """Counts jobs of all stages and estimates the time left.

    Args:
        jobs: numbers of jobs by kind.
        show: called with each line.
    """

    def __init__(self, jobs: Counter[str], workers: int, show: Callable[[str], None]):
        self._left, self._all, self._workers = jobs, jobs.total(), workers
        self._show, self._seconds = show, defaultdict[str, list[float]](list)

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Show the end of a job."""
        self._left[job.kind] -= 1
        if outcome.state == FINISHED:
            self._seconds[job.kind].append(outcome.seconds)
        said = f"[{self._all - self._left.total()}/{self._all}] {job.directory} {outcome.state}"
        said += f" after {duration(outcome.seconds)}" if outcome.state == FINISHED else ""
        said += f": {outcome.reason}" if outcome.reason else ""
        self._show(f"{said}{self._time_left()}")

    def _time_left(self) -> str:
        measured = [second for each in self._seconds.values() for second in each]
        if not measured or not self._left.total():
            return ""
        mean = sum(measured) / len(measured)
        left = 0.0
        for kind, count in self._left.items():
            own = self._seconds[kind]
            left += count * (sum(own) / len(own) if own else mean)
        return f", about {duration(left / self._workers)} left"


def run_jobs(jobs: Sequence[Job], workers: int, clock: Clock) -> dict[Path, Outcome]:
    """Run jobs, `workers` at a time; returns how each ended, by directory.

    An interrupt asks the runs to save and stop, and is raised again when they have.
    """
    context, waiting = _fork_server(), list(jobs)[::-1]
    running: dict[Connection, tuple[Job, Any, float]] = {}
    ended: dict[Path, Outcome] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(job, theirs))
                process.start()
                theirs.close()
                running[ours] = job, process, time.monotonic()
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                job, process, began = running.pop(connection)
                outcome = replace(_outcome(connection, process), seconds=time.monotonic() - began)
                ended[job.directory] = outcome
                clock.ended(job, outcome)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join()
    return ended


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add `--workers`."""
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes at a time, of one thread each; default: one per core",
    )


def failures_of(ended: dict[Path, Outcome]) -> list[str]:
    """Return a line for each job that did not finish."""
    return [
        f"{path}: {outcome.state} {outcome.reason}"
        for path, outcome in ended.items()
        if outcome.state not in (FINISHED, FOUND)
    ]


def exit_status(run: Callable[[], list[str]]) -> int:
    """Run jobs, print what failed, and return the exit status of the command."""
    try:
        failures = run()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context.set_forkserver_preload(PRELOADED)
    return context


def _outcome(connection: Connection, process: Any) -> Outcome:
    """Return how a process ended; it sends nothing if it was killed."""
    try:
        outcome = connection.recv()
    except EOFError:
        outcome = None
    connection.close()
    process.join()
    if outcome is None:
        code = process.exitcode or 0
        why = f"signal {-code}" if code < 0 else f"status {code}"
        outcome = Outcome(FAILED, f"its process ended with {why}")
    return outcome


def _child(job: Job, connection: Connection) -> None:
    """Run a job; what it prints goes to a file next to its directory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    log = job.directory.with_name(f"{job.directory.name}.log")
    with log.open("a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        outcome = measure_variance(job) if job.kind == "variance" else train_member(job)
    except BaseException as error:
        traceback.print_exc()
        said = " ".join(str(error).split())
        outcome = Outcome(FAILED, f"{type(error).__name__}: {said} (see {log})")
    connection.send(outcome)


def _end_with_parent() -> None:
    """Ask the run to save and stop when the parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def train_member(job: Job) -> Outcome:
    """Train or resume a run, unless it is finished."""
    from agrpo_megatron.rollout.session import NoView
    from agrpo_megatron.runs import directory
    from agrpo_megatron.training.passed import check_start
    from agrpo_megatron.training.run import train

    resolved = directory.resolve_run(job.settings, world_size=1)
    settings, phases = resolved.settings, PHASES.get(job.kind, ("rl",))
    done = directory.progress(settings)
    is_start = done is not None and (done.phase, done.iteration) == ("sft", settings.sft.iterations)
    if job.kind == "whole" and is_start:  # without RL, its evaluation is the end
        is_start = not settings.train.iterations and bool(read_run(job.directory).evaluations)
    if directory.is_finished(settings, done) or ("sft" in phases and is_start):
        return Outcome(FOUND)
    check_start(resolved, world_size=1)
    reason = train(resolved, NoView(), phases=phases)
    return Outcome(FINISHED) if reason is None else Outcome(STOPPED, reason)


def measure_variance(job: Job) -> Outcome:
    """Measure the gradients of members at a start, as `agrpo variance` does."""
    from agrpo_megatron.cli.variance import rows_of
    from agrpo_megatron.config.schema import load
    from agrpo_megatron.config.settings import AlgorithmSettings, Settings
    from agrpo_megatron.runs.files import write_whole
    from agrpo_megatron.runs.resolve import resolve
    from agrpo_megatron.training.variance.command import FULL, Plan, measure

    path = job.directory / "variance.json"
    members = {name: list(own) for name, own in job.members.items()}
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["members"] == members:
        return Outcome(FOUND)
    resolved = resolve(job.settings, world_size=1)
    variants = {
        name: load(Settings, job.file, [*job.overrides, *own]).algorithm
        for name, own in members.items()
    }
    # A run that chooses its own draws has no gradient of its own.
    variants = {name: own for name, own in variants.items() if own.mc_samples != "auto"}
    base = resolved.settings.algorithm
    groups, size = base.prompts_per_iteration, base.group_size
    full = AlgorithmSettings(name=FULL, prompts_per_iteration=groups, group_size=size)
    variants.setdefault(FULL, full)
    plan = Plan(variants, BATCHES, REPEATS, first=resolved.settings.train.iterations)
    found = measure(resolved, None, plan, show=print)
    rows = [row for row in rows_of(found) if row["estimator"] in members]
    job.directory.mkdir(parents=True, exist_ok=True)
    text = {"members": members, "rows": rows, "signal": found.signal}
    write_whole(path, json.dumps(text, indent=1) + "\n")
    return Outcome(FINISHED)
