"""Compare the graders, parsers and prompts with golden values of the public reference code.

    python tools/check_rewards.py tests/fixtures/tasks/*.jsonl tests/fixtures/tasks/*.jsonl.gz

Each file holds JSON lines of one kind: rewards (`rewards`, with `eval` or `eval_parser`), released
generations (`verdict`) or prompts (`messages`). Floats agree to 1e-9, everything else exactly.
Values that the file itself marks as faults of the reference (`reference_quirk`) or as decided by
a clock (`timing_dependent`) may differ; where they do, they are counted and, with --verbose,
shown. Exit status 1 where anything else differs.
"""

import argparse
import gzip
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agrpo_megatron.tasks import agrpo, d1
from agrpo_megatron.tasks.benchmarks import build_prompt, read_problem
from agrpo_megatron.tasks.latex import last_boxed

TASKS = {"math500": "math"}
SLOW = 2.0  # seconds: no grader may take longer


@dataclass
class Tally:
    """What the comparison of one file found."""

    equal: int = 0
    chosen: list[str] = field(default_factory=list)  # differ where the reference is at fault
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    scores: dict[str, list[float]] = field(default_factory=dict)  # [right, all] by task


def main() -> int:
    """Check the files named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".jsonl or .jsonl.gz")
    parser.add_argument("--verbose", action="store_true", help="also show where we chose to differ")
    arguments = parser.parse_args()
    failed = False
    for path in arguments.files:
        try:
            tally = check_file(path)
        except (OSError, ValueError, LookupError) as error:
            print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
        _report(path, tally, verbose=arguments.verbose)
        failed = failed or bool(tally.wrong) or tally.slowest > SLOW or not tally.equal
    print("FAILED" if failed else "all values agree")
    return int(failed)


def check_file(path: Path) -> Tally:
    """Compare every value of a file; raises LookupError for rows of an unknown kind."""
    tally = Tally()
    for number, row in enumerate(_rows(path), start=1):
        for kind, check in KINDS.items():
            if kind in row:
                check(row, tally, f"{row.get('id', number)}")
                break
        else:
            raise LookupError(f"line {number} holds none of {', '.join(KINDS)}")
    return tally


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _check_rewards(row: dict, tally: Tally, name: str) -> None:
    task, text = _task(row), row["completion"]
    fields = _fields(row)
    protocol = agrpo if "eval" in row else d1
    graders = {function.__name__: function for function in protocol.REWARDS[task]}
    for function, expected in row["rewards"].items():
        value = _timed(tally, graders[function], text, fields)
        _compare(tally, row, f"{name} {function}", value, expected, part=function)
    if protocol is agrpo:
        found = _timed(tally, agrpo.parse_answer, text)
        _compare(tally, row, f"{name} parse_ans", found, row["eval"]["parse_ans"], part="eval")
        verdict = _timed(tally, VERDICTS[task], text, fields)
        _compare(tally, row, f"{name} grade", verdict, row["eval"]["grade"], part="eval")
        return
    if "gold_answer" in row:
        fields["answer"] = row["gold_answer"]
    verdict = _timed(tally, d1.PARSERS[task], text, fields)
    _compare(tally, row, f"{name} eval", verdict, row["eval_parser"], part="eval")


def _check_generation(row: dict, tally: Tally, name: str) -> None:
    task = _task(row)
    fields = _generation_fields(task, row)
    verdict = _timed(tally, d1.PARSERS[task], row["generation"], fields)
    _compare(tally, row, f"{name} {task}", verdict, row["verdict"], part="eval")
    right, count = d1.counted(verdict)
    total = tally.scores.setdefault(task, [0, 0])
    total[0] += right
    total[1] += count


def _check_prompt(row: dict, tally: Tally, name: str) -> None:
    problem = read_problem(_task(row), row["problem"])
    chat = build_prompt(_task(row), row["source"], row["stage"], problem)
    messages = [message._asdict() for message in chat.messages]
    _compare(tally, row, f"{name} messages", messages, row["messages"], part="")
    _compare(tally, row, f"{name} prefill", chat.prefill, row["assistant_prefill"], part="")


def _task(row: dict) -> str:
    return TASKS.get(row["task"], row["task"])


def _fields(row: dict) -> dict[str, Any]:
    """Return the problem of a rewards row by our names."""
    fields = dict(row)
    if "nums" in row:
        fields["numbers"] = row["nums"]
    if row["task"] == "sudoku":
        fields["solution"] = row.get("solution", row.get("answer"))
    if row["task"] == "math500" and "eval_parser" in row:
        fields["answer"] = last_boxed(row["answer"])
    return fields


def _generation_fields(task: str, row: dict) -> dict[str, Any]:
    gold = row["gold"]
    if task == "countdown":
        return {"numbers": gold[0], "target": gold[1]}
    if task == "sudoku":
        return {"puzzle": row["puzzle"], "solution": gold}
    return {"answer": str(gold)}


def _timed(tally: Tally, function: Callable, *arguments: Any) -> Any:
    started = time.perf_counter()
    value = function(*arguments)
    tally.slowest = max(tally.slowest, time.perf_counter() - started)
    return value


def _compare(tally: Tally, row: dict, name: str, ours: Any, theirs: Any, *, part: str) -> None:
    if _same(ours, theirs):
        tally.equal += 1
        return
    line = f"{name}: {_short(ours)} where the reference has {_short(theirs)}"
    if row.get("timing_dependent"):
        tally.chosen.append(f"{line} (decided by a clock)")
        return
    quirks = row.get("reference_quirk", "").split("; ")
    excuse = next((q for q in quirks if q and _concerns(q, part)), None)
    (tally.chosen if excuse else tally.wrong).append(f"{line} ({excuse})" if excuse else line)


def _concerns(quirk: str, part: str) -> bool:
    named = quirk.partition(":")[0]
    return part in named or named == "math_verify" or (part == "eval" and named in RELATED)


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(_same(ours.get(k), v) for k, v in theirs.items())
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
    print(
        f"{path.name}: {tally.equal} values equal, {len(tally.wrong)} wrong, "
        f"{len(tally.chosen)} where the reference is at fault; slowest {tally.slowest:.2f} s"
    )
    for task, (right, count) in tally.scores.items():
        print(f"  {task}: {right}/{count} = {100 * right / count} %")
    for line in [*tally.wrong, *(tally.chosen if verbose else [])]:
        print(f"  {line}")


KINDS: dict[str, Callable[[dict, Tally, str], None]] = {
    "rewards": _check_rewards,
    "verdict": _check_generation,
    "messages": _check_prompt,
}
# Faults that a verdict shares with the training reward, which alone they are named after.
RELATED = ("correctness_reward", "countdown_correctness_reward", "sudoku_correctness_reward")
VERDICTS: dict[str, Callable[[str, dict[str, Any]], float]] = {
    "gsm8k": agrpo.gsm8k_verdict,
    "math": agrpo.math_verdict,
    "countdown": agrpo.countdown_verdict,
    "sudoku": agrpo.sudoku_share,
}

if __name__ == "__main__":
    sys.exit(main())
