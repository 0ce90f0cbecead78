"""Grade the gold answers of problem files: gold must be right, other answers wrong.

    python tools/check_golds.py DIR

DIR has files with names by benchmark: gsm8k*, math*, countdown*, sudoku*. Each problem is written
in the prompts of both protocols, and answered with its gold answer and with another problem's, in
the protocol's layout; reward and verdict grade both. Golds that a protocol refuses are listed with
the cause. The exit status is 1 if one is refused without a known cause or a wrong answer is
accepted, and 2 if DIR is not a folder.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agrpo_megatron.config.settings import TaskSettings
from agrpo_megatron.tasks import benchmarks, build_task
from agrpo_megatron.tasks.countdown_problems import solve
from agrpo_megatron.tasks.rewards.latex import is_equivalent
from agrpo_megatron.types import Problem

BENCHMARKS = ("gsm8k", "math", "countdown", "sudoku")
COMMAS = "a thousands comma: the string rule of protocol d1 does not read it"


@dataclass
class Count:
    """Results of the graders of one protocol on one file."""

    right: int = 0  # golds accepted by reward and verdict
    refused: int = 0  # wrong answers refused by both
    problems: int = 0
    known: list[str] = field(default_factory=list)  # exceptions with their cause
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Check the files of the folder on the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        print(f"{folder} is not a folder; give one with problem files", file=sys.stderr)
        return 2
    failed = found = False
    for path in sorted(folder.iterdir()):
        task = next((name for name in BENCHMARKS if path.name.startswith(name)), None)
        if task is None:
            continue
        for protocol in benchmarks.PROTOCOLS:
            count = check_file(path, task, protocol=protocol)
            _report(path, protocol, count)
            failed, found = failed or bool(count.faults), True
    print("FAILED" if failed or not found else "every gold is right, except for the causes above")
    return int(failed or not found)


def check_file(path: Path, name: str, *, protocol: str) -> Count:
    """Grade the golds of a file by one protocol."""
    options = {"protocol": protocol, "train": "none", "eval": str(path)}
    if name in ("countdown", "sudoku"):  # without a training file they generate problems
        options["train"] = str(path)
    task = build_task(TaskSettings(name=name, options=options, leaks="keep"))
    problems = task.problems("eval")
    count = Count(problems=len(problems))
    for place, problem in enumerate(problems):
        assert task.prompt(problem) and task.eval_prompt(problem)
        answer, other = _answer(name, problem), _other_answer(name, problems, place)
        accepted = [_grade(task, problem, text) for text in (answer, other)]
        count.right += all(accepted[0].values())
        count.refused += not any(accepted[1].values())
        for grader in [grader for grader, right in accepted[0].items() if not right]:
            line = f"row {place + 1}: {grader} refuses the gold answer {answer}"
            _note(count, line, cause=_cause(protocol, name, answer))
        for grader in [grader for grader, right in accepted[1].items() if right]:
            line = f"row {place + 1}: {grader} accepts {other} for {answer}"
            _note(count, line, cause=_cause(protocol, name, other))
    return count


def _note(count: Count, line: str, *, cause: str) -> None:
    (count.known if cause else count.faults).append(f"{line} ({cause})" if cause else line)


def _grade(task, problem: Problem, answer: str) -> dict[str, bool]:
    """Return which graders accept an answer, in the layouts of training and of evaluation."""
    protocol = task.options.protocol
    text = benchmarks.solution_text(task.name, protocol, problem.fields, answer)
    raw = text
    if protocol == "d1" and task.name != "sudoku":
        raw = f"r\n</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer><|eot_id|>"
    reward, verdict = task.reward(problem, text), task.verdict(problem, raw, raw)
    return {"reward": reward.correct, "verdict": verdict.correct}


def _answer(name: str, problem: Problem) -> str:
    if name == "countdown":
        return solve(problem.fields["numbers"], problem.fields["target"])
    return problem.fields["solution" if name == "sudoku" else "answer"]


def _other_answer(name: str, problems: Sequence[Problem], place: int) -> str:
    """Return the answer of the next problem with a different answer."""
    own = _answer(name, problems[place])
    for step in range(1, len(problems)):
        other = _answer(name, problems[(place + step) % len(problems)])
        if not is_equivalent(_plain(other), _plain(own)):
            return other
    return "0"


def _plain(answer: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3})", "", answer)


def _cause(protocol: str, name: str, answer: str) -> str:
    return COMMAS if protocol == "d1" and name == "gsm8k" and "," in answer else ""


def _report(path: Path, protocol: str, count: Count) -> None:
    print(
        f"{path.name}, {protocol}: {count.right}/{count.problems} golds right, "
        f"{count.refused}/{count.problems} wrong answers refused, {len(count.known)} exceptions"
    )
    for line in [*count.known, *count.faults]:
        print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
