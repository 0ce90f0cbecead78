"""`agrpo evaluate` and `agrpo report`: accuracy over a grid, and figures of runs and grids."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from agrpo_megatron.cli.common import (
    Target,
    add_command,
    add_overrides,
    add_target,
    is_main,
    open_target,
    world_size,
)

EVALUATE = """\
what is evaluated:
  agrpo evaluate runs/tiny                            the run's latest checkpoint, on its own task
  agrpo evaluate runs/tiny --checkpoint best          another of its checkpoints
  agrpo evaluate models/LLaDA-8B-Instruct task.name=gsm8k task.options.protocol=d1
  torchrun --nproc-per-node 8 -m agrpo_megatron evaluate models/LLaDA-8B-Instruct task.name=math

over a grid (every length with every number of denoising steps):
  ... evaluation.completion_lengths=[128,256,512] evaluation.tokens_per_step=[2]   d1's protocol
  ... evaluation.completion_lengths=[256] evaluation.steps=[32,64,128,256]
  ... --sweep                                         from one step a block to one step a token
  ... 'evaluation.tasks={gsm8k: {}, math: {}, mine: {name: my_task.py}}'           several tasks

sampled (pass@1, pass@2, pass@4, ... of 16 completions each):
  ... evaluation.samples=16 evaluation.temperature=0.7

pass rates of training problems, for a curriculum (task.pass_rates):
  ... evaluation.split=train evaluation.samples=8 evaluation.temperature=1

The same command resumes an evaluation that was interrupted, even by kill -9.
OUTPUT/completions.jsonl has every completion with its verdict, OUTPUT/results.json the numbers
with their 95 % intervals. `agrpo config --section evaluation` explains
every setting; `agrpo report RUN/evaluations/*` draws accuracy against steps and FLOPs.
"""
REPORT = """\
examples:
  agrpo report runs/tiny                              figures and page of a run
  agrpo report runs/a runs/b                          and a page of several runs, with seed bands
  agrpo report runs/tiny/evaluations/* --output frontier.png
  agrpo report runs/sweep                             a sweep's table so far
  agrpo report before=evaluations/LLaDA after=runs/x/evaluations/best --output frontier.png
"""


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Add `evaluate`."""
    text = "accuracy, over lengths, denoising steps and tasks"
    command = add_command(commands, "evaluate", text, evaluate, epilog=EVALUATE)
    add_target(command)
    command.add_argument("--sweep", action="store_true", help="steps: one a block to one a token")
    command.add_argument(
        "--output", type=Path, metavar="DIR", help="default: RUN/evaluations/CHECKPOINT[-NAME]"
    )
    command.add_argument("--name", metavar="NAME", help="distinguishes evaluations of a checkpoint")
    command.add_argument("--label", metavar="TEXT", help="name of the model in figures")
    command.add_argument(
        "--restart", action="store_true", help="move an earlier evaluation away, and start again"
    )
    command.add_argument(
        "--show-prompt",
        nargs="?",
        const="1",
        metavar="N",
        help="print the exact text and the token ids of each task's N-th (first) prompt, and end",
    )
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    add_overrides(command)


def add_report(commands: argparse._SubParsersAction) -> None:
    """Add `report`."""
    text = "figures and an HTML page of runs, and the frontier of evaluations"
    command = add_command(commands, "report", text, report, epilog=REPORT)
    command.add_argument(
        "targets", nargs="+", metavar="[LABEL=]DIR", help="directory of a run, evaluation or sweep"
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="PNG of the frontier, or HTML page of several runs; default: in the same folder",
    )


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate a model over the grid of `evaluation`, and print the results."""
    asked = arguments.show_prompt
    if asked is not None and "=" in asked:  # the next argument is a setting, not N
        arguments.overrides, asked = [asked, *arguments.overrides], "1"
    target = open_target(arguments)
    from agrpo_megatron.evaluation.plan import plan_evaluation
    from agrpo_megatron.evaluation.results import ResultStore
    from agrpo_megatron.hardware.kernels import kernels_for
    from agrpo_megatron.runs.directory import move_away
    from agrpo_megatron.runs.files import check_folder, naming_full_disk

    if asked is not None:
        return _show_prompts(target, asked)
    name = f"{target.name}-{arguments.name}" if arguments.name else target.name
    store = ResultStore(arguments.output or target.folder / name)
    is_begun = store.is_begun()  # --restart moves no directory of something else
    check_folder(store.directory, key="--output")
    plan = plan_evaluation(
        target.settings,
        checkpoint=target.checkpoint,
        label=arguments.label or f"{target.run} {name}".strip(),
        world_size=world_size(),
        is_sweep=arguments.sweep,
        stored=store.stored() if is_begun and not arguments.restart else None,
    )
    # After --restart there are no results; another rank may still be moving the old ones.
    results = None
    if not arguments.restart:
        store.check(plan.evaluation)
        results = store.results()
    if results is None or not results["finished"]:
        kernels_for(plan.resolved.settings)  # check this machine before files move
        if arguments.restart and is_main() and (moved := move_away(store.directory)):
            _say(f"the earlier evaluation is now {moved}")
        results = _run(plan, store)
    elif is_main():
        _say(f"{store.directory} is finished; add --restart to evaluate again")
    with naming_full_disk(store.directory):
        if is_main():
            _conclude(results, store.directory, as_json=arguments.json)
    return 0


def _show_prompts(target: Target, asked: str) -> int:
    """Print text and ids of one prompt of each task; `asked` is its number, from 1."""
    from agrpo_megatron.evaluation.plan import plan_evaluation
    from agrpo_megatron.tasks.base import task_prompts

    plan = plan_evaluation(
        target.settings, checkpoint=target.checkpoint, label="", world_size=world_size()
    )
    for label, task in plan.tasks.items():
        problems, tokenizer = plan.problems[label], plan.resolved.tokenizer
        number = int(asked) if asked.isdecimal() else 0
        if not 1 <= number <= len(problems):
            raise ValueError(
                f"--show-prompt {asked}: task {label} has {len(problems)} problems; use 1 to "
                f"{len(problems)}"
            )
        chosen = problems[number - 1]
        (prompt,) = task_prompts(task, [chosen], split=plan.split)
        ids = tokenizer.encode_prompt(prompt)
        if is_main():
            print(f"task {label}, problem {chosen.key}, {len(ids)} tokens\n")
            print(f"{tokenizer.text_of(prompt)}\n\n{' '.join(map(str, ids))}\n")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write figures and page of each run; draw evaluations into one frontier."""
    from agrpo_megatron.launch.sweep import SWEEP
    from agrpo_megatron.launch.table import show_table
    from agrpo_megatron.reports.evaluations import find_evaluations
    from agrpo_megatron.reports.page.html import write_report
    from agrpo_megatron.reports.summary import compare
    from agrpo_megatron.runs.files import check_folder

    runs, evaluations = [], []
    for text in arguments.targets:
        path, label = _labelled(text)
        if (path / SWEEP).is_file():
            show_table(path)
            continue
        found = find_evaluations(path, label)
        evaluations += found
        if not found or (path / "metrics.jsonl").exists():
            runs.append(path)
    for run_dir in runs:
        for folder in (run_dir, run_dir / "figures"):
            check_folder(folder, key="DIR")
        for path in write_report(run_dir):
            print(path)
    if len(runs) > 1:
        page = arguments.output if not evaluations else None
        if page is not None:
            check_folder(page.parent, key="--output")
        compare(runs, page)
    if evaluations:
        folder, _ = evaluations[0]
        path = arguments.output or folder.parent / "frontier.png"
        check_folder(path.parent, key="--output")
        _frontier([results for _, results in evaluations], path)
    return 0


def _run(plan, store):
    """Start the ranks and evaluate what is left; returns the results on the main rank."""
    from agrpo_megatron.evaluation.evaluate import evaluate_grid
    from agrpo_megatron.evaluation.failures import check_solutions
    from agrpo_megatron.evaluation.open import opened
    from agrpo_megatron.reports.evaluations import EvaluationView
    from agrpo_megatron.resilience.failure import ending_together
    from agrpo_megatron.runs.files import naming_full_disk

    view = EvaluationView(live=plan.resolved.settings.logging.live, is_main=is_main())
    for note in plan.resolved.task.notes:
        view.note(note)
    batches = len(plan.batches())
    opening = opened(plan.resolved, plan.checkpoint)
    with ending_together(view), naming_full_disk(store.directory), opening as (session, network):
        if is_main():
            view.begin(
                {label: len(found) for label, found in plan.problems.items()},
                cells=len(plan.cells),
                batches=batches,
            )
        for note in check_solutions(session.run, [plan.split]):
            view.note(note)
        return evaluate_grid(session, network, plan, store, view.show, partial(view.tick, batches))


def _conclude(results: dict, directory: Path, *, as_json: bool) -> None:
    """Write the table; print the results as a table or JSON."""
    from agrpo_megatron.reports.evaluations import markdown_table, print_results

    (directory / "table.md").write_text(markdown_table([results]), encoding="utf-8")
    if as_json:
        print(json.dumps(results, indent=2))
        return
    print_results([results])
    print(f"\nresults {directory}\nnext    agrpo report {directory}")


def _frontier(evaluations: list[dict], path: Path) -> None:
    from agrpo_megatron.reports.evaluations import markdown_table, print_results
    from agrpo_megatron.reports.plots.frontier import write_frontier

    print(write_frontier(evaluations, path))
    table = path.with_suffix(".md")
    table.write_text(markdown_table(evaluations), encoding="utf-8")
    print(table)
    print_results(evaluations)


def _labelled(text: str) -> tuple[Path, str | None]:
    """Split LABEL=DIR; an existing directory may have an equals sign in its name."""
    label, equals, path = text.partition("=")
    return (Path(path), label) if equals and not Path(text).exists() else (Path(text), None)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
