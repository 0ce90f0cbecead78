"""The results of a run in a few lines; several runs side by side."""

from pathlib import Path

from rich.console import Console

from agrpo_megatron.reports.page.html import write_report
from agrpo_megatron.reports.plots.compare import write_comparison
from agrpo_megatron.reports.read import after, before, read_run
from agrpo_megatron.reports.tables import overview_table
from agrpo_megatron.reports.text import points


def conclude(run_dir: Path) -> None:
    """Write a run's figures and page, and print held-out accuracy before and after."""
    *_, page = write_report(run_dir)
    run = read_run(run_dir)
    first, last = before(run), after(run)
    if first and last:
        old, new = first["accuracy"], last["accuracy"]
        change = f"{100 * old:.1f} % -> {100 * new:.1f} %"
        print(f"held-out accuracy {change} ({points(new - old)}, {last['problems']} problems)")
    print(f"report  {page}")
    print(f"next    agrpo sample {run_dir} --trace")


def compare(run_dirs: list[Path]) -> None:
    """Print held-out accuracy of several runs side by side, and draw it next to the first.

    Raises:
        ValueError: a run was not evaluated both before and after.
    """
    rows = []
    runs = {run_dir.name: [read_run(run_dir)] for run_dir in run_dirs}
    for name, [run] in runs.items():
        first, last = before(run), after(run)
        if first is None or last is None:
            raise ValueError(f"{run.path} has no evaluation before and after; let it finish first")
        old, new = first["accuracy"], last["accuracy"]
        shares = {"before %": old, "after %": new, "gain": new - old}
        rows.append({"run": name, **{key: f"{100 * x:.1f}" for key, x in shares.items()}})
    print(write_comparison(runs, run_dirs[0].parent / "comparison.png"))
    Console().print(overview_table(rows, title="held-out accuracy"))
