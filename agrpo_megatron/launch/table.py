"""The table of a sweep: a row for each member, best first, also for failed members."""

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.launch.sweep import flow, read_sweep
from agrpo_megatron.reports.read import Row, after, before, read_run
from agrpo_megatron.reports.tables import markdown_table, overview_table
from agrpo_megatron.reports.text import number, percent
from agrpo_megatron.resilience.exit_status import LAUNCH_FOLDER
from agrpo_megatron.runs.directory import is_finished
from agrpo_megatron.runs.files import write_whole
from agrpo_megatron.runs.progress import CHECKPOINTS, RUN_SETTINGS, latest_checkpoint

# The cause of a failure in a log: the last line that matches the first pattern with any match.
CAUSES = (
    re.compile(r"agrpo: error: |\brank \d+ failed: "),
    re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b"),
    re.compile(r"\berror: |\bkilled\b", re.IGNORECASE),
    re.compile(r"^agrpo: (?!job |node |finished|requeued|cancelled)"),  # of the batch script
)
RANK = re.compile(r"^\[rank\d+\]: ")  # torch's prefix of a traceback's lines
BEGUN = "agrpo: job "  # printed by a batch script at the start of each attempt
TAIL = 1 << 20  # bytes at the end of a log that are searched
NUMERIC = ("accuracy before", "accuracy after", "gain")


@dataclass(frozen=True)
class Member:
    """The result of a member of a sweep."""

    name: str
    directory: str
    settings: dict[str, Any]
    state: str  # finished, stopped (or still running), failed, not begun
    iterations: str  # of its current phase
    before: float | None = None  # held-out accuracies, and their 95 % intervals
    before_interval: list[float] | None = None
    after: float | None = None
    after_interval: list[float] | None = None
    error: str | None = None  # the last error in its log
    log: str | None = None


def show_table(directory: Path) -> None:
    """Write the table of a sweep into its directory, and print it.

    Raises:
        ValueError: the directory holds no sweep.
    """
    members = summarise(directory)
    rows = [_cells(member) for member in members]
    tree = {"members": [asdict(member) for member in members]}
    write_whole(directory / "summary.json", json.dumps(tree, indent=2) + "\n")
    table = markdown_table(rows, left=rows[0].keys() - set(NUMERIC))
    failed = [member for member in members if member.error is not None]
    lines = [f"- {m.name} {m.state}: `{m.error}`, see `{m.log or m.directory}`\n" for m in failed]
    write_whole(directory / "summary.md", "".join([table, "\n" if failed else "", *lines]))
    console = Console(width=200, soft_wrap=True)
    console.print(overview_table(rows))
    texts = [f"{m.name} {m.state}: {m.error}\n   log {m.log}" for m in failed]
    for text in [*texts, f"table {directory / 'summary.md'}"]:
        console.print(f"\n{text}", markup=False, highlight=False)


def summarise(directory: Path) -> list[Member]:
    """Return all members of a sweep, best first; an unreadable member does not affect the others.

    Raises:
        ValueError: the directory holds no sweep.
    """
    members = [
        _member(number, directory / name, settings)
        for number, (name, settings) in enumerate(read_sweep(directory).members.items())
    ]
    return sorted(members, key=lambda m: (m.after is None, -(m.after or 0.0), m.name))


def _member(number: int, directory: Path, settings: dict[str, Any]) -> Member:
    problem = None
    try:
        finished, iterations = _progress(directory)
    except (ValueError, RuntimeError, OSError) as error:
        finished, iterations, problem = False, "", str(error)
    attempts, outcome = _attempts(directory), ""
    with suppress(IndexError, OSError):
        outcome = (attempts[-1] / "outcome").read_text(encoding="utf-8")
    # Only the newest attempt counts: the run has survived earlier errors. But a stuck attempt
    # does not name the cause; the attempt before it does.
    at = -2 if outcome.startswith("stuck") and len(attempts) > 1 else -1
    log, line = _last_error(_logs(directory, number, attempts[at] if attempts else None))
    cause = line or problem
    error, state = None, "stopped" if iterations or log else "not begun"
    if finished:
        state = "finished"
    elif cause is not None and not outcome.startswith("requeue"):
        error, state = cause, "failed"
    logged = None if log is None else str(log)
    scores = _accuracies(directory)
    place = directory.name, str(directory)
    return Member(*place, settings, state, iterations, *scores, error=error, log=logged)


def _progress(directory: Path) -> tuple[bool, str]:
    """Return whether a run is finished, and its last saved iteration."""
    found = latest_checkpoint(directory / CHECKPOINTS)
    if found is None:
        return False, ""
    settings = load(Settings, directory / RUN_SETTINGS)
    done = found[1]
    of = settings.train.iterations if done.phase == "rl" else settings.sft.iterations
    return is_finished(settings, done), f"{done.phase} {done.iteration}/{of}"


def _accuracies(directory: Path) -> tuple[Any, ...]:
    """Return held-out accuracy and interval, before and after training; None where missing."""
    try:
        run = read_run(directory)
    except (ValueError, OSError):
        return None, None, None, None
    return *_accuracy(before(run)), *_accuracy(after(run))


def _accuracy(row: Row | None) -> tuple[float | None, list[float] | None]:
    if row is None:
        return None, None
    low, high = number(row, "accuracy_low"), number(row, "accuracy_high")
    return number(row, "accuracy"), None if low is None or high is None else [low, high]


def _last_error(logs: list[Path]) -> tuple[Path | None, str | None]:
    """Return the log with an error and the error's line; the first log if no log has one.

    Args:
        logs: newest first.
    """
    for cause in CAUSES:
        for log in logs:
            lines = [line for line in _tail(log) if cause.search(line)]
            if lines:
                return log, lines[-1]
    return (logs[0] if logs else None), None


def _attempts(directory: Path) -> list[Path]:
    """Return the attempts of a run in order."""
    folder = directory / LAUNCH_FOLDER
    numbers = re.compile(r"\d+")  # of the job and of the attempt
    return sorted(
        folder.glob("*/attempt-*"),
        key=lambda path: [int(n) for n in numbers.findall(str(path.relative_to(folder)))],
    )


def _logs(directory: Path, number: int, attempt: Path | None) -> list[Path]:
    """Return the logs of an attempt's ranks, newest first, then its batch script's log."""
    ranks = list(attempt.glob("rank-*.log")) if attempt is not None else []
    batch = list((directory.parent / LAUNCH_FOLDER).glob(f"*_{number}.log"))
    return sorted(ranks, key=_age, reverse=True) + sorted(batch, key=_age, reverse=True)[:1]


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _tail(path: Path) -> list[str]:
    """Return the last lines of a log; for a batch script, of its last attempt."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL))
        lines = stream.read().decode(errors="replace").splitlines()
    begun = max((n for n, line in enumerate(lines) if line.startswith(BEGUN)), default=-1)
    return [RANK.sub("", line).strip() for line in lines[begun + 1 :]]


def _cells(member: Member) -> dict[str, str]:
    gain = ""
    if member.before is not None and member.after is not None:
        gain = f"{100 * (member.after - member.before):+.1f}"
    return {
        "member": member.name,
        **{key: flow(value) for key, value in member.settings.items()},
        "state": member.state,
        "iterations": member.iterations,
        "accuracy before": _share(member.before, member.before_interval),
        "accuracy after": _share(member.after, member.after_interval),
        "gain": gain,
    }


def _share(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return ""
    spread = f" ({percent(interval[0])} to {percent(interval[1])})" if interval else ""
    return percent(value) + spread
