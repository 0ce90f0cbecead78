"""The results of a GPU check: figures compared with targets, and as a table."""

import json
from pathlib import Path
from typing import Any

SCHEMA = 1
Record = dict[str, Any]

# Name, comparison, number.
TARGETS = (
    ("FP8 blockwise updates, in bf16's tokens/s (te)", ">=", 1.25),
    ("FP8 blockwise rollouts, in bf16's tokens/s (te)", ">=", 1.2),
    ("bf16 update, share of the matrix ceiling (te)", ">=", 0.45),
    ("mismatch in bf16, mean of exp(abs(dlogp))", "<", 1.01),
    ("mismatch in FP8 blockwise, mean of exp(abs(dlogp))", "<", 1.03),
    ("tests that failed", "<=", 0),
)
NOT_MEASURED = "not measured"
REHEARSED = "rehearsed, not measured"


def read_suite(path: Path) -> Record:
    """Return the test results, from the lines that `tests/gpu` writes."""
    if not path.exists():
        return {"ran": False, "failed": [], "skipped": [], "figures": {}}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    collected = max((line["count"] for line in lines if line["event"] == "collected"), default=0)
    ends = [line for line in lines if line["event"] == "end"]
    ended = {line["test"] for line in ends}
    crashed = [
        {"test": line["test"], "reason": "the process died in it, or it ran out of time"}
        for line in lines
        if line["event"] == "start" and line["test"] not in ended
    ]
    by = {
        outcome: [
            {"test": line["test"], "reason": line["reason"]}
            for line in ends
            if line["outcome"] == outcome
        ]
        for outcome in ("failed", "skipped")
    }
    figures: Record = {}
    for line in ends:
        figures.update(line["figures"])
    return {
        "ran": True,
        "collected": collected,
        "passed": sum(line["outcome"] == "passed" for line in ends),
        "failed": by["failed"] + crashed,
        "skipped": by["skipped"],
        "not_reached": max(0, collected - len(ends) - len(crashed)),
        "seconds": round(sum(line["seconds"] for line in ends), 1),
        "figures": figures,
    }


def finish(record: Record) -> Record:
    """Add ratios and targets, which follow from what was measured."""
    ratios = _ratios(record)
    suite = record["suite"]
    figures = suite["figures"]
    found = (
        ratios.get("fp8 blockwise / bf16, update"),
        ratios.get("fp8 blockwise / bf16, rollout"),
        ratios.get("te bf16 update / bf16 ceiling"),
        figures.get("mismatch/bf16/mean"),
        figures.get("mismatch/fp8 blockwise/mean"),
        len(suite["failed"]) + suite.get("not_reached", 0) if suite["ran"] else None,
    )
    targets = []
    for (name, sign, number), value in zip(TARGETS, found, strict=True):
        state = REHEARSED if record["rehearsal"] else _state(value, sign, number)
        wanted = f"{sign} {number:g}"
        targets.append({"target": name, "wanted": wanted, "found": value, "state": state})
    return {**record, "ratios": ratios, "targets": targets}


def _state(value: float | None, sign: str, number: float) -> str:
    if value is None:
        return NOT_MEASURED
    met = {">=": value >= number, "<": value < number, "<=": value <= number}[sign]
    return "met" if met else "missed"


def _ratios(record: Record) -> dict[str, float]:
    """Return tokens/s of one job over those of another, and shares of the ceiling."""
    jobs = record["jobs"]
    pairs = {
        "fp8 blockwise / bf16": ("te fp8 blockwise", "te bf16"),
        "fp8 tensorwise / bf16": ("te fp8 tensorwise", "te bf16"),
        "te / local in bf16": ("te bf16", "local bf16"),
        "local bf16 / local fp32": ("local bf16", "local fp32"),
        "deterministic / not": ("te bf16 deterministic", "te bf16"),
        "batch-invariant / not": ("te bf16 batch-invariant", "te bf16"),
    }
    found = {}
    for name, (above, below) in pairs.items():
        for part in ("update", "rollout"):
            ours, theirs = (jobs.get(job, {}).get(part) for job in (above, below))
            if ours and theirs:
                ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
                found[f"{name}, {part}"] = ratio
    ceiling = (jobs.get("ceiling", {}).get("ceilings") or {}).get("bf16")
    for name in ("te bf16", "local bf16"):
        update = jobs.get(name, {}).get("update")
        if ceiling and update:
            found[f"{name} update / bf16 ceiling"] = update["tflops"] / ceiling
    return found


def table(record: Record) -> str:
    """Return the record as Markdown."""
    machine, suite = record["machine"], record["suite"]
    lines = [f"# GPU check: {machine.get('gpu') or 'no GPU'}", ""]
    if record["rehearsal"]:
        lines += [
            "**REHEARSAL at tiny sizes on a CPU: it shows that the check runs. No figure here is a "
            "measurement.**",
            "",
        ]
    lines += [f"- {name}: {machine[name]}" for name in sorted(machine)]
    lines += [f"- {name}: {record[name]}" for name in ("commit", "date", "command", "seconds")]
    lines += ["", "## Tests", "", *_suite(suite)]
    lines += ["", "## Speed", "", *_ceiling(record), *_speeds(record)]
    lines += _graphs(record["jobs"])
    lines += ["", "| ratio of tokens/s, or share | |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in record["ratios"].items()]
    lines += ["", "## Targets", "", "| target | wanted | found | |", "|---|---|---|---|"]
    lines += [
        f"| {t['target']} | {t['wanted']} | {_number(t['found'])} | {t['state']} |"
        for t in record["targets"]
    ]
    return "\n".join(lines) + "\n"


def _suite(suite: Record) -> list[str]:
    if not suite["ran"]:
        return ["Not run."]
    failed, skipped = suite["failed"], suite["skipped"]
    lines = [
        f"{suite['passed']} passed, {len(failed)} failed, {len(skipped)} skipped, "
        f"{suite['not_reached']} not reached, of {suite['collected']}; {suite['seconds']} s.",
        "",
    ]
    lines += [f"- FAILED {test['test']}: {test['reason']}" for test in failed]
    lines += [f"- skipped {test['test']}: {test['reason']}" for test in skipped]
    figures = suite["figures"]
    if figures:
        lines += ["", "| measured by a test | |", "|---|---|"]
        lines += [f"| {name} | {_number(figures[name])} |" for name in sorted(figures)]
    return lines


def _ceiling(record: Record) -> list[str]:
    found = record["jobs"].get("ceiling", {}).get("ceilings")
    if not found:
        return []
    names = [name for name in ("bf16", "fp8", "fp32") if found.get(name)]
    size = found["size"]
    said = ", ".join(f"{name} {found[name]:.1f} TFLOP/s" for name in names)
    return [f"Ceiling, products of random {size} x {size} matrices: {said}.", ""]


def _speeds(record: Record) -> list[str]:
    ceiling = (record["jobs"].get("ceiling", {}).get("ceilings") or {}).get("bf16")
    lines = [
        "| kernels | part | tokens/s | TFLOP/s | of the bf16 ceiling | peak GiB | min, max |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, job in record["jobs"].items():
        for part in ("rollout", "update"):
            if part in job:
                lines.append(f"| {name} | {part} | {_speed(job[part], ceiling)} |")
        if message := job.get("refused") or job.get("failed") or job.get("cut"):
            lines.append(f"| {name} | {message} | | | | | |")
    return lines


def _speed(speed: Record, ceiling: float | None) -> str:
    share = f"{speed['tflops'] / ceiling:.1%}" if ceiling else ""
    peak = f"{speed['peak_gib']:.1f}" if speed["peak_gib"] else ""
    fastest, slowest = (f"{1e3 * seconds:.1f}" for seconds in speed["spread"])
    return (
        f"{speed['tokens_per_second']:,.0f} | {speed['tflops']:.1f} | {share} | {peak} | "
        f"{fastest}, {slowest} ms"
    )


def _graphs(jobs: Record) -> list[str]:
    lines = []
    for name, job in jobs.items():
        for found in job.get("graphs", []):
            way = "graphs" if found["graphs"] else "eager"
            lines.append(f"| {name} | {found['rows']} | {way} | {1e3 * found['seconds']:.2f} |")
    head = ["", "| small rollout forwards | rows | launched | ms |", "|---|---|---|---|"]
    return head + lines if lines else []


def _number(value: float | None) -> str:
    """Return a figure with four digits; empty for None."""
    return "" if value is None else f"{value:.4g}"
