"""Train under SLURM with random faults, and compare with an undisturbed run.

    . CLUSTER/env.sh    # if sbatch is not set up yet
    python tools/soak.py examples/tiny.yaml --minutes 30 --every 45 sft.iterations=20

Both runs use `agrpo launch` on CPU nodes. Injected faults (a rank killed, a rank that hangs, a
failed save) strike at the first section of their kind after their time; outside faults are a
requeued job, a stop signal and a killed batch script. Every iteration is slowed down, to reach the
requested length. Writes soak.json into the folder of the runs; exit status 0 if the run finished
with metrics bit-identical to the undisturbed run's.
"""

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

INSIDE = {"kill": ("rollout", "update"), "hang": ("rollout", "update"), "fail_save": None}
OUTSIDE = ("requeue", "signal", "kill_batch")
TIMED = (
    "timing/",
    "perf/tokens_per_second",
    "section/",
    "straggler/",
)  # metrics measured by a clock
POLL, JOB_TIMEOUT = 1.0, 3600.0  # seconds: between two checks of a job, and for an undisturbed job
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Fault:
    """One fault of the plan."""

    at: float  # seconds from the job's start
    kind: str
    rank: int


def main() -> int:
    """Run both, compare them, and print the faults; returns the exit status."""
    arguments = _arguments()
    folder = Path(arguments.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    whole, disturbed = folder / "undisturbed", folder / "disturbed"
    print(f"undisturbed run in {whole}", flush=True)
    state, _ = _follow(_launch(arguments, whole, {}), [], JOB_TIMEOUT)
    if state != "COMPLETED":
        print(f"soak: error: the undisturbed run ended as {state}", file=sys.stderr)
        return 1
    plan = make_plan(arguments)
    print(f"disturbed run in {disturbed}: {len(plan)} faults planned", flush=True)
    began = time.time()
    faults = {
        "AGRPO_FAULTS": fault_text(plan, began, arguments.slow),
        "AGRPO_FAULTS_DIR": str(folder / "faults"),
    }
    job = _launch(arguments, disturbed, faults)
    outside = [fault for fault in plan if fault.kind in OUTSIDE]
    state, struck = _follow(job, outside, JOB_TIMEOUT * 6)
    struck += _struck(folder / "faults")
    times = sorted([began, *(at for at, _ in struck)])
    found = {
        "state": state,
        "minutes": round((time.time() - began) / 60, 1),
        "seed": arguments.seed,
        "faults": dict(Counter(kind for _, kind in struck)),
        "longest_gap_seconds": round(max(b - a for a, b in itertools.pairwise(times)), 1),
        **_compare(disturbed, whole),
    }
    (folder / "soak.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    table = Table(title="soak")
    for name, value in found.items():
        table.add_row(name, json.dumps(value))
    Console().print(table)
    return 0 if state == "COMPLETED" and found["same_metrics"] else 1


def make_plan(arguments: argparse.Namespace) -> list[Fault]:
    """Return faults at random times, no two further apart than `--every`, for `--minutes`."""
    draw = random.Random(arguments.seed)
    kinds = [*INSIDE, *OUTSIDE]
    plan, at = [], 0.0
    while at < arguments.minutes * 60:
        at += arguments.every * draw.uniform(0.6, 1.0)
        # Every kind once, in random order, before any kind repeats.
        if len(plan) % len(kinds) == 0:
            draw.shuffle(kinds)
        kind = kinds[len(plan) % len(kinds)]
        plan.append(Fault(at, kind, draw.randrange(arguments.nodes)))
    return plan


def fault_text(plan: list[Fault], began: float, slow: float) -> str:
    """Return AGRPO_FAULTS for the injected faults and the slowdown."""
    draw = random.Random(len(plan))
    parts = [f"slow:rank=0,section=rollout,seconds={slow}"]
    for fault in plan:
        if fault.kind in INSIDE:
            section = draw.choice(INSIDE[fault.kind] or ("checkpoint",))
            at = f"at={began + fault.at:.1f}"
            parts.append(f"{fault.kind}:rank={fault.rank},section={section},{at}")
    return "; ".join(parts)


def _launch(arguments: argparse.Namespace, run: Path, environment: dict[str, str]) -> str:
    """Submit a run; returns the job's number."""
    words = [sys.executable, "-m", "agrpo_megatron", "launch", arguments.file]
    words += ["--nodes", str(arguments.nodes), f"run.dir={run}", *arguments.overrides]
    words += ["launch.gpus_per_node=0", "launch.ranks_per_node=1", "logging.wandb=disabled"]
    words += ["launch.cpus_per_task=1", "run.threads=1"]
    # Faults may strike before an attempt makes progress, several times in a row.
    words += ["resilience.idle_attempts=20"]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    found = re.search(r"^job\s+(\d+)", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        sys.exit(f"soak: error: nothing was submitted: {done.stderr.strip()}")
    return found[1]


def _follow(job: str, outside: list[Fault], patience: float) -> tuple[str, list[tuple[float, str]]]:
    """Wait for a job's end, and cause the outside faults meanwhile.

    Returns:
        Its last state, and the time and kind of each fault.
    """
    began, waiting, struck = time.time(), list(outside), []
    while time.time() - began < patience:
        state = _state(job)
        if state in ENDED:
            time.sleep(2 * POLL)  # a killed batch script fails the job before its requeue
            if (state := _state(job)) in ENDED:
                return state, struck
        due = [fault for fault in waiting if time.time() - began >= fault.at]
        if due and state == "RUNNING" and _strike(due[0].kind, job):
            waiting.remove(due[0])
            struck.append((time.time(), due[0].kind))
            print(f"{time.strftime('%H:%M:%S')} {due[0].kind}", flush=True)
        time.sleep(POLL)
    return "STILL RUNNING", struck


def _strike(kind: str, job: str) -> bool:
    """Cause an outside fault; returns whether that succeeded."""
    if kind == "requeue":
        return subprocess.run(["scontrol", "requeue", job], capture_output=True).returncode == 0
    if kind == "signal":
        return subprocess.run(["scancel", "--signal=USR1", job]).returncode == 0
    scripts = [process for process in psutil.process_iter() if _is_batch(process, job)]
    for process in scripts:
        process.kill()
    return bool(scripts)


def _is_batch(process: psutil.Process, job: str) -> bool:
    """Return whether a process is the shell of a job's batch script."""
    try:
        command = " ".join(process.cmdline())
        return f"job{int(job):05d}/slurm_script" in command
    except psutil.Error:
        return False


def _state(job: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    found = re.search(r"JobState=(\w+)", shown.stdout)
    return found[1] if found else "UNKNOWN"


def _struck(folder: Path) -> list[tuple[float, str]]:
    """Return the time and kind of each injected fault that struck."""
    return [(note.stat().st_mtime, note.name.split("-")[1]) for note in folder.glob("*")]


def _compare(ours: Path, theirs: Path) -> dict:
    """Compare two runs' metrics, except those measured by a clock."""
    mine, expected = (_metrics(path / "metrics.jsonl") for path in (ours, theirs))
    attempts = (ours / "launch" / "attempts.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "attempts": len(attempts),
        "lines": len(mine),
        "same_metrics": mine == expected and len(expected) > 0,
        "same_samples": (ours / "samples.jsonl").read_bytes()
        == (theirs / "samples.jsonl").read_bytes(),
    }


def _metrics(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="settings file")
    parser.add_argument("--folder", default="runs/soak", help="folder of both runs (runs/soak)")
    parser.add_argument("--nodes", type=int, default=2, help="nodes of one rank each (2)")
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes with faults (30)")
    parser.add_argument("--every", type=float, default=45.0, help="seconds between faults (45)")
    parser.add_argument("--slow", type=float, default=1.5, help="seconds added to a rollout (1.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the plan (0)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings to change"
    )
    arguments = parser.parse_intermixed_args()
    if not 0 < arguments.every <= 60:
        parser.error(f"--every={arguments.every:g} is not over 0 and up to 60 seconds")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
