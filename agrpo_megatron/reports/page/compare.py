"""The page of several runs: curves by family, where they differ, and what made each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agrpo_megatron.evaluation.statistics import t_interval
from agrpo_megatron.reports.families import AXES, curve, differences, families
from agrpo_megatron.reports.page.html import encoded, environment
from agrpo_megatron.reports.page.provenance import made_by, times
from agrpo_megatron.reports.plots.families import families_figure
from agrpo_megatron.reports.plots.style import DARK, LIGHT, render
from agrpo_megatron.reports.read import Run, accuracy_interval, after, before
from agrpo_megatron.reports.text import percent, points

CAPTION = (
    "Strong lines are means over the seeds of a family, bands the 95 % t interval of that mean, "
    "faint lines single runs. Training curves are running means."
)


def write_comparison_page(runs: Sequence[Run], path: Path) -> Path:
    """Write one self-contained HTML page of several runs; return its path."""
    grouped = families(runs)
    page = (
        environment()
        .get_template("compare.html.j2")
        .render(
            name=f"{len(runs)} runs",
            subtitle=f"{len(grouped)} famil{'ies' if len(grouped) > 1 else 'y'}: runs of a family "
            "differ in the seed, and in nothing else that alters a number",
            figures=list(_figures(grouped)),
            caption=CAPTION,
            tables=[_results(grouped), _differences(runs), _made(runs), _packages(runs)],
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _figures(grouped: Mapping[str, Sequence[Run]]) -> Iterator[tuple[str, str, str]]:
    """Yield a title and two pictures for each axis that any run has."""
    for axis, along in AXES.items():
        every = [run for runs in grouped.values() for run in runs]
        if not any(len(curve(run, "reward/mean", phase="rl", axis=axis)[0]) for run in every):
            continue

        def draw(theme, axis=axis, along=along):
            return families_figure(grouped, theme, axis=axis, along=along)

        yield f"By {along}", encoded(render(draw, LIGHT)), encoded(render(draw, DARK))


def _results(grouped: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return a row for each run, and one for the mean of each family of several."""
    rows = []
    for label, runs in grouped.items():
        finals = []
        for run in runs:
            first, last = before(run), after(run)
            cells = [label, run.path.resolve().name, str(run.rl[-1]["iteration"]) if run.rl else ""]
            cells += [percent(first["accuracy"]) if first else ""]
            if last is not None:
                finals.append(last["accuracy"])
                interval = accuracy_interval(last)
                cells += [percent(last["accuracy"]), _span(interval, percent)]
                cells += [points(last["accuracy"] - first["accuracy"]) if first else ""]
            rows.append(tuple(cells + [""] * (7 - len(cells))))
        if len(finals) > 1:
            mean, span = float(np.mean(finals)), _span(t_interval(finals), percent)
            name = f"mean of {len(finals)}"
            rows.append((label, name, "", "", percent(mean), f"{span} (seeds)", ""))
    names = ("family", "run", "iterations", "before", "after", "95 % interval", "gain")
    return {"title": "Held-out accuracy", "names": names, "rows": rows, "opened": True}


def _span(interval: tuple[float, float] | None, form: Callable[[float], str]) -> str:
    return f"{form(interval[0])} to {form(interval[1])}" if interval else ""


def _differences(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the settings that differ, the seed included, a column for each run."""
    values = differences(runs)
    seeds = [str(run.settings.get("run.seed", "")) for run in runs]
    found = {"run.seed": seeds, **values} if len(set(seeds)) > 1 else values
    names = ("setting", *(run.path.resolve().name for run in runs))
    rows = [(key, *own) for key, own in found.items()]
    return {"title": "Settings that differ", "names": names, "rows": rows, "opened": True}


def _made(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what made each run: code, command, host, devices, and the time that it took."""
    facts = [{"run": run.path.resolve().name, **made_by(run), **times(run)} for run in runs]
    return _of_facts("What made them", facts, opened=True)


def _packages(runs: Sequence[Run]) -> dict[str, Any]:
    facts = [
        {
            "run": run.path.resolve().name,
            **(run.provenance[-1]["packages"] if run.provenance else {}),
        }
        for run in runs
    ]
    return _of_facts("Versions", facts, opened=False)


def _of_facts(title: str, facts: Sequence[Mapping[str, str]], *, opened: bool) -> dict[str, Any]:
    names = list(dict.fromkeys(name for own in facts for name in own))
    rows = [tuple(own.get(name, "") for name in names) for own in facts]
    return {"title": title, "names": names, "rows": rows, "opened": opened}
