"""Evaluations: read from their directories, shown while they run, and as tables."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from agrpo_megatron.evaluation.grid import EVALUATION, EVALUATIONS, RESULTS, EvaluationProgress
from agrpo_megatron.reports import tables
from agrpo_megatron.reports.text import compact, duration, percent, visible

EVERY = 20.0  # seconds between two lines where there is no terminal
TEXT_COLUMNS = ("model", "task")
LAST_COLUMNS = ("steps run", "tokens", "FLOPs", "failures")
WIDEST = 1000  # characters that a table may need

Results = dict[str, Any]  # content of results.json


def find_evaluations(path: Path, label: str | None = None) -> list[tuple[Path, Results]]:
    """Return directory and results of an evaluation, or of all evaluations of a run.

    Args:
        label: name of the model, instead of the evaluation's.

    Raises:
        ValueError: an evaluation has no results yet.
    """
    if (path / EVALUATION).exists():
        folders = [path]
    else:
        folders = sorted(file.parent for file in (path / EVALUATIONS).glob(f"*/{EVALUATION}"))
    found = [(folder, _read(folder)) for folder in folders]
    if label is not None:
        for folder, results in found:
            results["label"] = label if len(found) == 1 else f"{label} {folder.name}"
    return found


def _read(folder: Path) -> Results:
    path = folder / RESULTS
    if not path.exists():
        raise ValueError(f"{folder} has no {RESULTS} yet; let `agrpo evaluate` finish a cell first")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not JSON; evaluate again with --restart") from None


def print_results(evaluations: Sequence[Results]) -> None:
    """Print the cells of evaluations as a table; values shared by all rows go above it."""
    rows = _rows(evaluations)
    shared = [n for n in TEXT_COLUMNS if len({row[n] for row in rows}) == 1]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in rows[0]:
        if name not in shared:
            table.add_column(Text(name), justify="left" if name in TEXT_COLUMNS else "right")
    for row in rows:
        table.add_row(*(Text(cell) for name, cell in row.items() if name not in shared))
    measuring = Console(width=WIDEST)
    needed = Measurement.get(measuring, measuring.options, table).maximum
    console = Console(width=max(Console().width, needed))  # a terminal wraps long lines
    console.print(Text("  ".join(rows[0][name] for name in shared), style="bold"))
    console.print(table)


def markdown_table(evaluations: Sequence[Results]) -> str:
    """Return the cells of evaluations as a table in Markdown."""
    return tables.markdown_table(_rows(evaluations), left=TEXT_COLUMNS)


def _rows(evaluations: Sequence[Results]) -> list[dict[str, str]]:
    """Return one row of texts for every cell, all with the same columns.

    Raises:
        ValueError: there is no cell.
    """
    rows = [_row(results, cell) for results in evaluations for cell in results["cells"]]
    if not rows:
        raise ValueError("no evaluation has finished a cell; continue `agrpo evaluate`")
    found = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in found if name not in LAST_COLUMNS] + list(LAST_COLUMNS)
    if all(row["failures"] == "0" for row in rows):
        names.remove("failures")
    return [{name: row.get(name, "") for name in names} for row in rows]


def _row(results: Results, cell: Mapping[str, Any]) -> dict[str, str]:
    low, high = cell["accuracy_interval"]
    passes = {k: found["value"] for k, found in cell.get("pass_at", {}).items() if k != "1"}
    means = {"score": cell["score"], **{visible(n): v for n, v in cell["summary"].items()}}
    return {
        "model": visible(results["label"]),
        "task": visible(cell["task"]),
        "length": str(cell["completion_length"]),
        "steps": str(cell["denoising_steps"]),
        "problems": str(cell["problems"]),
        "accuracy": percent(cell["accuracy"]),
        "95 % interval": f"{100 * low:.1f} to {100 * high:.1f}",
        **{f"pass@{k}": percent(value) for k, value in passes.items()},
        **{name: compact(round(value, 4)) for name, value in means.items()},
        "steps run": compact(round(cell["steps_run"], 1)),
        "tokens": compact(round(cell["completion_tokens"], 1)),
        "FLOPs": f"{cell['flops']:.2e}",
        "failures": str(cell["failures"]),
    }


class EvaluationView:
    """Shows an evaluation while it runs: a bar on a terminal, else occasional lines.

    The output goes to standard error, so that results can be piped.
    """

    def __init__(self, *, live: bool, is_main: bool):
        self._is_main = is_main
        self._console = Console(stderr=True)
        self._is_live = live and is_main and self._console.is_terminal
        texts = TextColumn("{task.description}"), TextColumn("{task.fields[left]}")
        self._bars = Bars(texts[0], BarColumn(bar_width=12), texts[1], console=self._console)
        self._bar = self._bars.add_task("evaluating", total=1.0, left="")
        self._began = self._said = time.monotonic()

    def __enter__(self) -> "EvaluationView":
        if self._is_live:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_live:
            self._bars.stop()

    def note(self, text: str) -> None:
        """Print a line of text."""
        if self._is_main:
            self._console.print(Text(visible(text), style="dim"), soft_wrap=True)

    def begin(self, tasks: Mapping[str, int], *, cells: int, batches: int) -> None:
        """Print what is evaluated, before anything is.

        Args:
            tasks: problems by task.
            cells: lengths and numbers of steps of each task.
        """
        asked = ", ".join(f"{count} problems of {task}" for task, count in tasks.items())
        self.note(f"evaluating {asked}, at {cells} lengths and steps, in {batches} batches")

    def tick(self, batches: int, number: int, share: float) -> None:
        """Show how far a batch is, where no line was printed for a while.

        Args:
            number: of the batch, from 0.
            share: of its denoising steps that are done.
        """
        now = time.monotonic()
        if self._is_main and not self._is_live and now - self._said > EVERY:
            self._said = now
            line = f"batch {number + 1}/{batches}  {percent(share)} of its denoising steps"
            print(line, file=sys.stderr, flush=True)

    def show(self, progress: EvaluationProgress) -> None:
        """Show the progress of the evaluation."""
        now = time.monotonic()
        pace = (now - self._began) / (progress.work_done - progress.work_before)
        left = f"{duration(pace * (1 - progress.work_done))} left"
        if self._is_live:
            text = "\n".join(_described(progress))
            self._bars.update(self._bar, description=text, completed=progress.work_done, left=left)
            return
        if progress.problems_done == progress.problems or now - self._said > EVERY:
            self._said = now
            print("  ".join((*_described(progress), left)), file=sys.stderr, flush=True)


def _described(progress: EvaluationProgress) -> tuple[str, str]:
    """Return the task and cell, and the progress within them."""
    cell = progress.cell
    return (
        f"{visible(progress.task)}  {cell.completion_length} tokens, {cell.denoising_steps} steps",
        f"cell {progress.cell_number}/{progress.cells}  "
        f"problems {progress.problems_done}/{progress.problems}  "
        f"accuracy {percent(progress.accuracy)}",
    )
