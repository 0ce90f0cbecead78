"""What made a run: code, command, host, devices and time, as cells of a table."""

from collections.abc import Iterator
from typing import Any

from agrpo_megatron.reports.read import Run
from agrpo_megatron.reports.text import compact, duration, number, written

SHORT = 10  # digits of a commit


def made_by(run: Run) -> dict[str, str]:
    """Return what made a run, by name: every command, else the last attempt; empty if unknown."""
    if not run.provenance:
        return {}
    last = run.provenance[-1]
    return {
        "commit": _commit(last),
        "command": "; then ".join(dict.fromkeys(str(line["command"]) for line in run.provenance)),
        "host": str(last["host"]),
        "devices": f"{last['ranks']} x {last['device']}",
        "layout": f"{last['layout']}, {last['precision']}",
        "attempts": str(len(run.provenance)),
    }


def times(run: Run) -> dict[str, str]:
    """Return the wall-clock time of all attempts, and that of all devices together."""
    lines = run.sft + run.rl + run.evaluations
    seconds = max((number(row, "totals/seconds") or 0.0 for row in lines), default=0.0)
    if not seconds or not run.provenance:
        return {}
    hours = {name: compact(value) for name, value in _device_hours(run, seconds).items()}
    return {"wall time": duration(seconds), **hours}


def _device_hours(run: Run, seconds: float) -> dict[str, float]:
    """Return GPU-hours and CPU-hours; none where layouts changed at times that are not known."""
    starts = [number(line, "seconds_before") for line in run.provenance]
    if len({(line["ranks"], line["device"]) for line in run.provenance}) == 1:
        starts = [0.0, *[seconds] * (len(starts) - 1)]
    found: dict[str, float] = {}
    for line, start, end in zip(run.provenance, starts, [*starts[1:], seconds], strict=True):
        if start is None or end is None:
            return {}
        unit = "CPU-hours" if str(line["device"]).startswith("CPU") else "GPU-hours"
        found[unit] = found.get(unit, 0.0) + (end - start) * line["ranks"] / 3600
    return found


def attempts(run: Run) -> dict[str, Any]:
    """Return a table of all attempts."""
    names = ("time", "version", "commit", "command", "host", "devices", "layout", "packages")
    rows = [
        (
            line["time"],
            line["version"],
            _commit(line),
            line["command"],
            line["host"] + (f", job {line['job']}" if line["job"] else ""),
            f"{line['ranks']} x {line['device']}",
            f"{line['layout']}, {line['precision']}",
            ", ".join(f"{name} {version}" for name, version in line["packages"].items()),
        )
        for line in run.provenance
    ]
    return {"title": "Attempts", "names": names, "rows": rows}


def changed(run: Run) -> dict[str, Any]:
    """Return a table of the settings that changed during the run."""
    names = ("after", "setting", "old", "new")
    return {
        "title": "Settings that changed",
        "names": names,
        "rows": [*_changes(run)],
        "opened": True,
    }


def _changes(run: Run) -> Iterator[tuple[str, str, str, str]]:
    for line in run.changes:
        where = f"{line['phase']} iteration {line['iteration']}"
        yield where, line["key"], written(line["old"]), written(line["new"])


def _commit(line: dict[str, Any]) -> str:
    if line["commit"] is None:
        return "not from a repository"
    return line["commit"][:SHORT] + (", with changes" if line["changed"] else "")
