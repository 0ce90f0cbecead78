"""Compare the graders, parsers and prompts with golden values of the public reference code.

    python tools/check_rewards.py tests/fixtures/tasks/*.json*

Each file holds JSON lines of one kind: rewards (`rewards`, with `eval` or `eval_parser`), released
generations (`verdict`) or prompts (`messages`). Floats agree to 1e-9, everything else exactly.
Accuracies over generations are compared with NAME_aggregate.json in the folder of NAME.jsonl or
NAME.jsonl.gz.

Values that the file marks as faults of the reference (`reference_quirk`) or as dependent on time
(`timing_dependent`) may differ; such differences are counted and, with --verbose, shown. The exit
status is 1 if anything else differs.
"""

import argparse
import gzip
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agrpo_megatron.tasks.benchmarks import READERS, build_prompt
from agrpo_megatron.tasks.rewards import agrpo, d1, equivalence
from agrpo_megatron.tasks.rewards.latex import last_boxed

TASKS = {
    "gsm8k": "gsm8k",
    "math": "math",
    "math500": "math",
    "countdown": "countdown",
    "sudoku": "sudoku",
}


@dataclass
class Tally:
    """Result of the comparison of one file."""

    equal: int = 0
    chosen: list[str] = field(default_factory=list)  # differences by a fault of the reference
    wrong: list[str] = field(default_factory=list)
    skipped: int = 0  # rows and functions without a counterpart here
    slowest: float = 0.0
    scores: dict[str, list[int]] = field(default_factory=dict)  # [right, all] by task


def main() -> int:
    """Check the files of the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".jsonl or .jsonl.gz")
    parser.add_argument("--verbose", action="store_true", help="also show allowed differences")
    arguments = parser.parse_args()
    equivalence.equal("1/2", "0.5")  # loads math-verify before any grader is timed
    failed = False
    for path in arguments.files:
        if path.name.endswith("_aggregate.json"):
            continue  # read with its generations
        try:
            tally = check_file(path)
        except (OSError, ValueError) as error:
            print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
        _report(path, tally, verbose=arguments.verbose)
        failed = failed or bool(tally.wrong) or not tally.equal
    print("FAILED" if failed else "all values agree")
    return int(failed)


def check_file(path: Path) -> Tally:
    """Compare every value of a file with the value of this package."""
    tally = Tally()
    for number, row in enumerate(_rows(path), start=1):
        check = next((check for kind, check in KINDS.items() if kind in row), None)
        if check is None or row.get("task") not in TASKS:
            tally.skipped += 1
            continue
        name = f"{row.get('id', f'line {number}')}"
        try:
            check(row, tally, name)
        except (LookupError, TypeError, ValueError) as error:
            tally.wrong.append(f"{name} cannot be read: {type(error).__name__}: {error}")
    _check_aggregate(path, tally)
    return tally


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _check_rewards(row: dict, tally: Tally, name: str) -> None:
    task, text = TASKS[row["task"]], row["completion"]
    fields = _fields(row)
    protocol = agrpo if "eval" in row else d1
    graders = {function.__name__: function for function in protocol.REWARDS[task]}
    for function, expected in row["rewards"].items():
        if function not in graders:
            tally.skipped += 1
            continue
        value = _timed(tally, graders[function], text, fields)
        _compare(tally, row, f"{name} {function}", value, expected, part=function)
    if protocol is agrpo:
        found = _timed(tally, agrpo.parse_answer, text)
        _compare(tally, row, f"{name} parse_ans", found, row["eval"]["parse_ans"], part="eval")
        verdict = _timed(tally, VERDICTS[task], text, fields)
        _compare(tally, row, f"{name} grade", verdict, row["eval"]["grade"], part="eval")
    elif "eval_parser" in row:
        gold = {"answer": row["gold_answer"]} if "gold_answer" in row else {}
        verdict = _timed(tally, d1.PARSERS[task], text, {**fields, **gold})
        _compare(tally, row, f"{name} eval", verdict, row["eval_parser"], part="eval")


def _check_generation(row: dict, tally: Tally, name: str) -> None:
    task, gold = TASKS[row["task"]], row["gold"]
    fields = {"answer": str(gold)}
    if task == "countdown":
        fields = {"numbers": gold[0], "target": gold[1]}
    elif task == "sudoku":
        fields = {"puzzle": row["puzzle"], "solution": gold}
    verdict = _timed(tally, d1.PARSERS[task], row["generation"], fields)
    _compare(tally, row, f"{name} {task}", verdict, row["verdict"], part="eval")
    right, count = int(verdict.get("is_correct", False)), 1
    if task == "sudoku":
        right, count = verdict["correct_cells"], verdict["empty_cells"]
    total = tally.scores.setdefault(row["task"], [0, 0])
    total[0] += right
    total[1] += count


def _check_aggregate(path: Path, tally: Tally) -> None:
    """Compare the accuracies with the aggregate file of the generations."""
    aggregate = path.parent / f"{path.name.split('.')[0]}_aggregate.json"
    if not tally.scores or not aggregate.exists():
        return
    for total in json.loads(aggregate.read_text(encoding="utf-8")):
        right, count = tally.scores.get(total["task"], [0, 0])
        accuracy = 100 * right / count if count else math.nan
        ours = {"numerator": right, "denominator": count, "accuracy_percent": accuracy}
        theirs = {key: total[key] for key in ("numerator", "denominator", "accuracy_percent")}
        _compare(tally, {}, f"{aggregate.name} {total['task']}", ours, theirs, part="aggregate")


def _check_prompt(row: dict, tally: Tally, name: str) -> None:
    task = TASKS[row["task"]]
    # These rows have no gold answer; no prompt needs one.
    problem = READERS[task]({"answer": "#### 0", **row["problem"]})
    chat = build_prompt(task, row["source"], row["stage"], problem)
    messages = [message._asdict() for message in chat.messages]
    _compare(tally, row, f"{name} messages", messages, row["messages"], part="")
    prefill = row.get("assistant_prefill") or ""
    _compare(tally, row, f"{name} prefill", chat.prefill, prefill, part="")
    columns = row.get("columns") or {}
    for theirs, ours in {**COLUMNS, **({"answer": "solution"} if task == "sudoku" else {})}.items():
        if theirs in columns:
            _compare(tally, row, f"{name} {theirs}", problem.get(ours), columns[theirs], part="")


def _fields(row: dict) -> dict[str, Any]:
    """Return the problem of a rewards row by our names."""
    fields = dict(row)
    if "nums" in row:
        fields["numbers"] = row["nums"]
    if row["task"] == "sudoku":
        fields["solution"] = row.get("solution", row.get("answer"))
    if TASKS[row["task"]] == "math" and "gold_answer" in row:
        fields["answer"] = last_boxed(row["answer"])
    return fields


def _timed(tally: Tally, function: Callable, *arguments: Any) -> Any:
    started = time.perf_counter()
    try:
        value = function(*arguments)
    except Exception as error:  # always an error: ours must not raise
        value = {"exception": type(error).__name__}
    tally.slowest = max(tally.slowest, time.perf_counter() - started)
    return value


def _compare(tally: Tally, row: dict, name: str, ours: Any, theirs: Any, *, part: str) -> None:
    raised = isinstance(ours, dict) and "exception" in ours
    if _same(ours, theirs) and not raised:
        tally.equal += 1
        return
    line = f"{name}: {_short(ours)} where the reference has {_short(theirs)}"
    if row.get("timing_dependent") and not raised:
        tally.chosen.append(f"{line} (timing dependent)")
        return
    quirks = (row.get("reference_quirk") or "").split("; ")
    excuse = next((q for q in quirks if q and _concerns(q, row, part)), None)
    excused = excuse is not None and not raised
    (tally.chosen if excused else tally.wrong).append(f"{line} ({excuse})" if excused else line)


def _concerns(quirk: str, row: dict, part: str) -> bool:
    """Return whether a fault belongs to function `part`; `eval` is the evaluation's verdict."""
    if "verdict" in row:
        return True  # only the parser has read a generation
    named = quirk.partition(":")[0]
    same_rule = part == "eval" and named in RELATED
    return named == part or named.split(" ")[0] == part or named == "math_verify" or same_rule


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(_same(ours.get(k), v) for k, v in theirs.items())
    if isinstance(ours, complex):
        return str(ours) == theirs
    if isinstance(theirs, str) and isinstance(ours, float):
        theirs = float(theirs) if theirs in ("Infinity", "-Infinity", "NaN") else theirs
    if isinstance(theirs, int | float) and isinstance(ours, int | float):
        both_nan = math.isnan(ours) and math.isnan(theirs)
        return both_nan or ours == theirs or abs(ours - theirs) <= 1e-9
    return ours == theirs


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 160 else f"{text[:150]}... ({len(text)})"


def _report(path: Path, tally: Tally, *, verbose: bool) -> None:
    skipped = f", {tally.skipped} rows or functions unknown here" if tally.skipped else ""
    print(
        f"{path.name}: {tally.equal} values equal, {len(tally.wrong)} wrong, "
        f"{len(tally.chosen)} where the reference is at fault{skipped}; "
        f"slowest {tally.slowest:.2f} s of wall time"
    )
    for task, (right, count) in tally.scores.items():
        print(f"  {task}: {right}/{count} = {100 * right / count if count else math.nan} %")
    for line in [*tally.wrong, *(tally.chosen if verbose else [])]:
        print(f"  {line}")


KINDS: dict[str, Callable[[dict, Tally, str], None]] = {
    "rewards": _check_rewards,
    "verdict": _check_generation,
    "messages": _check_prompt,
}
COLUMNS = {  # the names of a problem's fields: theirs, ours
    "target": "target",
    "nums": "numbers",
    "numbers": "numbers",
    "puzzle": "puzzle",
    "solution": "solution",
}
# Faults of a rule that reward and verdict share; the files name only the reward.
RELATED = ("correctness_reward", "countdown_correctness_reward", "sudoku_correctness_reward")
VERDICTS: dict[str, Callable[[str, dict[str, Any]], float]] = {
    **agrpo.VERDICTS,
    "sudoku": agrpo.sudoku_share,
}

if __name__ == "__main__":
    sys.exit(main())
