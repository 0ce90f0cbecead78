"""The results of a GPU check: figures compared with targets, a verdict, and a table."""

import json
from pathlib import Path

from gpu_record import Record, heading, shown
from gpu_verdict import verdict, verdict_lines

SCHEMA = 2
SPEED, RESULT, TESTS = "speed", "result", "tests"
# Name, what it is a target of, comparison, number.
TARGETS = (
    ("FP8 blockwise updates, in bf16's tokens/s (te)", SPEED, ">=", 1.25),
    ("FP8 blockwise rollouts, in bf16's tokens/s (te)", SPEED, ">=", 1.2),
    ("bf16 update, share of the matrix ceiling (te)", SPEED, ">=", 0.45),
    ("mismatch in bf16, mean of exp(abs(dlogp))", RESULT, "<", 1.01),
    ("mismatch in FP8 blockwise, mean of exp(abs(dlogp))", RESULT, "<", 1.03),
    ("tests that failed", TESTS, "<=", 0),
)
NOT_MEASURED = "not measured"
REHEARSED = "rehearsed, not measured"


def read_suite(path: Path | None) -> Record:
    """Return the test results, from the lines that `tests/gpu` writes; None: no test ran.

    A test without an end took its process down. Only one that the script cut for time, the last
    before a line `cut`, was not reached.
    """
    if path is None or not path.exists():
        return {"ran": False, "failed": [], "skipped": [], "figures": {}}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    collected = max((line["count"] for line in lines if line["event"] == "collected"), default=0)
    ends = [line for line in lines if line["event"] == "end"]
    ended = {line["test"] for line in ends}
    open_at = [n for n, line in enumerate(lines) if line.get("test") not in {*ended, None}]
    is_cut = bool(lines) and lines[-1]["event"] == "cut" and open_at[-1:] == [len(lines) - 2]
    crashed = [
        {"test": lines[number]["test"], "reason": "its process ended in it"}
        for number in open_at[: -1 if is_cut else None]
    ]
    crashed += [
        {"test": "tests/gpu", "reason": f"pytest ended with status {line['status']}; see tests.log"}
        for line in lines
        if line["event"] == "broken"
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
    """Add ratios, targets and the verdict, which follow from what was measured."""
    ratios = _ratios(record)
    suite = record["suite"]
    figures = suite["figures"]
    found = (
        ratios.get("fp8 blockwise / bf16, update"),
        ratios.get("fp8 blockwise / bf16, rollout"),
        ratios.get("te bf16 update / bf16 ceiling"),
        figures.get("mismatch/bf16/mean"),
        figures.get("mismatch/fp8 blockwise/mean"),
        len(suite["failed"]) if suite["ran"] else None,
    )
    targets = []
    for (name, kind, sign, number), value in zip(TARGETS, found, strict=True):
        state = REHEARSED if record["rehearsal"] else _state(value, sign, number)
        wanted = f"{sign} {number:g}"
        target = {"target": name, "of": kind, "wanted": wanted, "found": value, "state": state}
        targets.append(target)
    record = {**record, "ratios": ratios, "targets": targets}
    return {**record, "verdict": _verdict(record)}


def _verdict(record: Record) -> Record:
    """Return the verdict on a record with its targets."""
    suite, jobs = record["suite"], record["jobs"]
    wrong = [f"test {test['test']}" for test in suite["failed"]]
    wrong += [f"{name}: {job['failed']}" for name, job in jobs.items() if "failed" in job]
    not_reached = [f"{name}: {job['cut']}" for name, job in jobs.items() if "cut" in job]
    not_reached += [f"{name}: not begun" for name in record["planned"] if name not in jobs]
    if not suite["ran"]:
        not_reached.append("the tests did not run")
    elif missing := suite["not_reached"]:
        not_reached.append(f"{missing} of {suite['collected']} tests")
    slow = []
    for target in record["targets"]:
        said = f"{target['target']}: {shown(target['found'])}, wanted {target['wanted']}"
        if target["state"] == NOT_MEASURED:
            not_reached.append(f"{target['target']}: {NOT_MEASURED}")
        elif target["state"] == "missed" and target["of"] != TESTS:  # those are listed by name
            (slow if target["of"] == SPEED else wrong).append(said)
    return verdict(wrong=wrong, not_reached=not_reached, slow=slow)


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
        "deterministic / not, 2048 tokens": ("te bf16 deterministic", "te bf16 2048 tokens"),
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
    lines = [*heading(record, "GPU check"), "", *verdict_lines(record["verdict"])]
    lines += ["", "## Speed", "", *_ceiling(record), *_speeds(record)]
    lines += _graphs(record["jobs"])
    lines += ["", "| ratio of tokens/s, or share | |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in record["ratios"].items()]
    lines += ["", "## Targets", "", "| target | wanted | found | |", "|---|---|---|---|"]
    lines += [
        f"| {t['target']} | {t['wanted']} | {shown(t['found'])} | {t['state']} |"
        for t in record["targets"]
    ]
    lines += ["", "## Tests", "", *_suite(record["suite"])]
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
        lines += [f"| {name} | {shown(figures[name])} |" for name in sorted(figures)]
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
