"""Compare estimators at equal training FLOPs: a table and figures with bands over seeds.

    python tools/compare_estimators.py examples/compare/countdown.yaml examples/compare/sudoku.yaml
    python tools/compare_estimators.py examples/compare/sudoku.yaml --only agrpo,espo --output out
    python tools/compare_estimators.py examples/compare/sudoku.yaml --seeds 5,6,7,8,9 --output again

Each file is a task: its settings, a supervised phase, and the budget `train.flops`, which counts
rollouts, updates and passes without gradient. members.yaml, next to it, has the estimators, their
settings and the seeds. Each seed has one supervised phase, from which all members start. Where a
setting of a member is a list, its runs on the tuning seeds choose the value with the highest mean
final accuracy; the tuning seeds are not used otherwise. Then each member runs on each seed.

The same command continues after an interrupt: what is finished is kept, and a run that was killed
resumes. The folder of a task (`run.dir` of its file, or a folder in --output) gets results.md,
results.json and figures. Exit status 1 if a run failed; the others are not affected, unless it was
a supervised phase, without which nothing starts.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from compare_figures import write_figures  # noqa: E402 - in this folder
from compare_jobs import (  # noqa: E402
    FINISHED,
    FOUND,
    Clock,
    Outcome,
    add_workers,
    exit_status,
    failures_of,
    run_jobs,
)
from compare_plan import Choice, Comparison, Job, Members, plan, read_members  # noqa: E402
from compare_results import (  # noqa: E402
    Estimate,
    Finished,
    Summary,
    at_edge,
    best_choice,
    difference,
    read_finished,
    write_results,
)

MEMBERS = "members.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and write the results; returns the exit status."""
    arguments = _arguments(argv)
    try:
        comparisons = _plans(arguments)
    except ValueError as error:
        print(f"compare_estimators: error: {error}", file=sys.stderr)
        return 2
    return exit_status(lambda: run(comparisons, arguments.workers))


def run(comparisons: Sequence[Comparison], workers: int) -> list[str]:
    """Run all stages, all tasks together; returns what failed."""
    clock = Clock(_counts(comparisons), workers, lambda line: print(line, flush=True))
    starts = [job for each in comparisons for job in each.starts()]
    ended = run_jobs(starts, workers, clock)
    if failures := failures_of(ended):
        return failures  # members of that seed have nothing to start from
    tuning = {each.folder: each.tuning() for each in comparisons}
    jobs = [
        job
        for stages in tuning.values()
        for choices in stages.values()
        for seeds in choices
        for job in seeds
    ]
    ended |= run_jobs(jobs, workers, clock)
    chosen = {each.folder: _chosen(each, tuning[each.folder], ended) for each in comparisons}
    jobs = [
        job
        for each in comparisons
        for name, choice in chosen[each.folder].items()
        for job in each.runs(name, choice)
    ]
    ended |= run_jobs(jobs, workers, clock)
    finished = {each.folder: _results(each, chosen[each.folder], ended) for each in comparisons}
    jobs = [
        each.variance({name: chosen[each.folder][name] for name in found})
        for each in comparisons
        if (found := finished[each.folder])
    ]
    ended |= run_jobs(jobs, workers, clock)
    failures = failures_of(ended)
    for each in comparisons:
        tuned = _tuned(each, tuning[each.folder], ended)
        failures += conclude(each, chosen[each.folder], finished[each.folder], tuned)
    return failures


def conclude(
    comparison: Comparison,
    chosen: dict[str, Choice],
    finished: dict[str, list[Finished]],
    tuned: dict[str, Any],
) -> list[str]:
    """Write the table and the figures of a task; returns the members that have no result."""
    missing = [name for name in comparison.members.choices if name not in finished]
    failures = [
        f"{comparison.folder}: {name} has fewer than two finished seeds" for name in missing
    ]
    theirs = finished.get(comparison.members.baseline, [])
    summaries = [
        Summary(
            name,
            chosen[name],
            tuple(runs),
            Estimate.of([run.final for run in runs]),
            None if name == comparison.members.baseline else difference(runs, theirs),
            at_edge(comparison.members.choices[name], chosen[name]),
        )
        for name, runs in finished.items()
    ]
    if not summaries:
        return failures
    path = write_results(comparison.folder, summaries, tuned, failures)
    print(f"\n{path.read_text(encoding='utf-8')}")
    for written in (
        path,
        *write_figures(comparison.folder, summaries, comparison.members.baseline),
    ):
        print(written)
    return failures


def _chosen(
    comparison: Comparison, tuning: dict[str, list[list[Job]]], ended: dict[Path, Outcome]
) -> dict[str, Choice]:
    """Return the settings of each member; one without a finished tuning run has none."""
    chosen, members = {}, comparison.members
    for name, choices in members.choices.items():
        best: int | None = 0
        if name in tuning:
            best = best_choice([_finals(jobs, members, ended) for jobs in tuning[name]])
        if best is not None:
            chosen[name] = choices[best]
    return chosen


def _results(
    comparison: Comparison, chosen: dict[str, Choice], ended: dict[Path, Outcome]
) -> dict[str, list[Finished]]:
    """Return the finished runs of the members that have at least two, enough for a band."""
    seeds = comparison.members.seeds
    found = {
        name: _finished(comparison.runs(name, choice), seeds, ended)
        for name, choice in chosen.items()
    }
    return {name: runs for name, runs in found.items() if len(runs) > 1}


def _tuned(
    comparison: Comparison, tuning: dict[str, list[list[Job]]], ended: dict[Path, Outcome]
) -> dict[str, Any]:
    """Return each choice of the tuned members with its final accuracies."""
    members = comparison.members
    return {
        name: [
            {"settings": choice, "accuracies": _finals(jobs, members, ended)}
            for choice, jobs in zip(members.choices[name], choices, strict=True)
        ]
        for name, choices in tuning.items()
    }


def _finals(jobs: Sequence[Job], members: Members, ended: dict[Path, Outcome]) -> list[float]:
    return [run.final for run in _finished(jobs, members.tuning_seeds, ended)]


def _finished(
    jobs: Sequence[Job], seeds: Sequence[int], ended: dict[Path, Outcome]
) -> list[Finished]:
    return [
        read_finished(job.directory, seed)
        for job, seed in zip(jobs, seeds, strict=True)
        if ended[job.directory].state in (FINISHED, FOUND)
    ]


def _counts(comparisons: Sequence[Comparison]) -> Counter[str]:
    """Return how many jobs of each kind there will be."""
    counts: Counter[str] = Counter()
    for each in comparisons:
        members = each.members
        counts["start"] += len(each.starts())
        tuned = [len(choices) for choices in members.choices.values() if len(choices) > 1]
        counts["tuning"] += sum(tuned) * len(members.tuning_seeds)
        counts["run"] += len(members.choices) * len(members.seeds)
        counts["variance"] += 1
    return counts


def _plans(arguments: argparse.Namespace) -> list[Comparison]:
    """Return the comparison of each file.

    Raises:
        ValueError: a file, a member or a name is wrong.
    """
    files = [Path(word) for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    if not files:
        raise ValueError("no settings file; use for example examples/compare/countdown.yaml")
    if arguments.workers < 1:
        raise ValueError(f"--workers={arguments.workers} must be at least 1; use for example 2")
    comparisons = []
    for file in files:
        members = read_members(arguments.members or file.parent / MEMBERS, arguments.seeds)
        comparisons.append(plan(file, _only(members, arguments.only), overrides, arguments.output))
    folders = [each.folder for each in comparisons]
    if len(set(folders)) < len(folders):
        raise ValueError(f"{folders[0]}: two tasks write this folder; give each its own run.dir")
    return comparisons


def _only(members: Members, names: str | None) -> Members:
    """Return some of the members, in the order of the file."""
    if names is None:
        return members
    wanted = names.split(",")
    for name in (*wanted, members.baseline):
        if name not in members.choices or name not in wanted:
            raise ValueError(
                f"--only={names}: {name} is no member, or the baseline that is missing; use "
                f"{members.baseline} and any of {', '.join(members.choices)}"
            )
    kept = {name: found for name, found in members.choices.items() if name in wanted}
    return replace(members, choices=kept)


def _numbers(text: str) -> list[int]:
    """Return the whole numbers of an argument; argparse shows the error of another text."""
    return [int(word) for word in text.split(",")]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="FILE [KEY=VALUE]", help="tasks; overrides")
    parser.add_argument("--members", type=Path, help="default: members.yaml next to each FILE")
    parser.add_argument("--only", metavar="NAME,...", help="some members; the baseline is needed")
    parser.add_argument("--seeds", type=_numbers, metavar="N,...", help="in place of the file's")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: run.dir of each FILE")
    add_workers(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
