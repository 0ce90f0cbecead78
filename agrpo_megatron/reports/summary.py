"""The results of a run in a few lines; several runs side by side."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from agrpo_megatron.reports.families import families
from agrpo_megatron.reports.page.compare import write_comparison_page
from agrpo_megatron.reports.page.html import write_report
from agrpo_megatron.reports.plots.compare import write_comparison
from agrpo_megatron.reports.read import Run, after, before, read_run, series
from agrpo_megatron.reports.tables import overview_table
from agrpo_megatron.reports.text import points


def conclude(run_dir: Path) -> None:
    """Write a finished run's figures and page, and print held-out accuracy before and after.

    Raises:
        KeyboardInterrupt: with a message, since an interrupt here loses no more than the report.
    """
    try:
        *_, page = write_report(run_dir)
    except KeyboardInterrupt:
        text = f"the run is finished and saved; `agrpo report {run_dir}` writes its report"
        raise KeyboardInterrupt(text) from None
    run = read_run(run_dir)
    first, last = before(run), after(run)
    if first and last:
        old, new = first["accuracy"], last["accuracy"]
        change = f"{100 * old:.1f} % -> {100 * new:.1f} %"
        print(f"held-out accuracy {change} ({points(new - old)}, {last['problems']} problems)")
    print(f"report  {page}")
    print(f"next    agrpo sample {run_dir} --trace")


def compare(run_dirs: Sequence[Path], output: Path | None = None) -> None:
    """Write the page of several runs, and print their held-out accuracy side by side.

    Runs may be under way, or without evaluations. Their held-out curves are a picture as well,
    where all of them have some.

    Args:
        output: the page, a .html file; None: comparison.html in the first run's parent.
    """
    runs, page = [read_run(run_dir) for run_dir in run_dirs], output
    page = run_dirs[0].parent / "comparison.html" if page is None else page
    grouped = families(runs)
    print(write_comparison_page(runs, page))
    if all(len(series(run.evaluations, "accuracy")[0]) for run in runs):
        in_lines = {label.replace(", ", ",\n"): own for label, own in grouped.items()}
        print(write_comparison(in_lines, page.with_suffix(".png")))
    rows = [_row(label, run) for label, own in grouped.items() for run in own]
    Console().print(overview_table(rows, title="held-out accuracy"))


def _row(label: str, run: Run) -> dict[str, str]:
    first, last = before(run), after(run)
    shares = {
        "before %": first["accuracy"] if first else None,
        "after %": last["accuracy"] if last else None,
        "gain": last["accuracy"] - first["accuracy"] if first and last else None,
    }
    texts = {key: "" if x is None else f"{100 * x:.1f}" for key, x in shares.items()}
    return {"run": run.path.resolve().name, "family": label, **texts}
