"""The report of a run: one HTML file that needs nothing else, in light and dark."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agrpo_megatron.config.schema import Described, describe, flatten
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.evaluation.statistics import wilson
from agrpo_megatron.reports.page.completions import completions, safe
from agrpo_megatron.reports.page.css import CSS
from agrpo_megatron.reports.plots.figures import draw_figures
from agrpo_megatron.reports.plots.style import DARK
from agrpo_megatron.reports.read import Row, Run, after, before, read_run, series, time_totals
from agrpo_megatron.reports.text import compact, duration, number, percent, points, written

CAPTIONS = {
    "learning": (
        "Learning",
        "Faint lines are single iterations, strong lines their running mean. Held-out problems are "
        "never trained on.",
    ),
    "policy": (
        "Policy",
        "Rollout and training run the same modules on the same weights, so the policy ratio of a "
        "first update is 1 up to rounding; its distance from 1 should stay far below the alarm.",
    ),
    "sampler": (
        "Sampler",
        "Live steps are the denoising steps of a completion that can be drawn for training. A "
        "rollout has no advantage where all completions of its group earn the same reward.",
    ),
    "time": (
        "Time",
        "Seconds by part of an iteration; other is what no part accounts for. The bars on the "
        "right name the colours.",
    ),
}
SPANS = 4  # stretches of iterations that an alarm names


def write_report(run_dir: str | Path) -> Path:
    """Write the report of a run, finished or under way, to its `report.html`; return the path.

    Raises:
        ValueError: the directory holds no metrics.
    """
    run = read_run(run_dir)
    path = Path(run_dir) / "report.html"
    path.write_text(_page(run), encoding="utf-8")
    return path


def _page(run: Run) -> str:
    seed = (run.settings.get("run") or {}).get("seed")
    task = (run.settings.get("task") or {}).get("name")
    family = (run.settings.get("model") or {}).get("family")
    parts = [("task", task), ("model family", family), ("seed", seed)]
    subtitle = ", ".join(f"{name} {value}" for name, value in parts if value is not None)
    broken = run.unreadable_lines
    footer = f"{broken} unreadable lines were left out." if broken else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe(run.name)}</title><style>{CSS}</style></head>
<body><main>
<header><h1>{safe(run.name)}</h1><div class="quiet">{safe(subtitle)}</div></header>
<div class="facts">{"".join(_facts(run))}</div>
{"".join(_figures(run))}
{completions(run)}
<h2>Numbers</h2>
{_evaluations(run)}{_metrics("Reinforcement learning", run.rl)}{_metrics("Supervised", run.sft)}
{_settings(run)}
<footer>{footer}</footer>
</main></body></html>
"""


def _facts(run: Run) -> Iterator[str]:
    """Yield the headline numbers that the run has."""
    yield _held_out(run)
    if run.rl:
        yield _fact("RL iterations", str(run.rl[-1]["iteration"]), _planned(run, "train"))
    if run.sft:
        yield _fact("SFT iterations", str(run.sft[-1]["iteration"]), _planned(run, "sft"))
    totals = time_totals(run)
    yield _fact("Time", duration(sum(totals.values())), "training and evaluation")
    speed = series(run.rl or run.sft, "tokens_per_second")[1]
    if len(speed):
        yield _fact("Tokens per second", compact(float(np.median(speed))), "median iteration")
    error = series(run.rl, "ratio/max_error")[1]
    if len(error):
        yield _fact("Policy ratio error", f"{error.max():.1e}", f"largest; {_alarm(run, error)}")
    if spans := _alarms(run):
        named = "; ".join(f"{name}: {span}" for name, span in spans.items())
        yield _fact("Alarms", str(len(spans)), f"iterations of {safe(named)}")
    left_out = sum(number(row, "skipped_updates") or 0 for row in (*run.sft, *run.rl))
    if left_out:
        yield _fact("Updates left out", compact(left_out), "loss or gradient was not finite")
    sizes = [size for row in (*run.sft, *run.rl) if (size := number(row, "parameters"))]
    if sizes:
        yield _fact("Parameters", compact(sizes[-1]), "")


def _held_out(run: Run) -> str:
    """Return the headline: held-out accuracy before and after, and the gain."""
    first, last = before(run), after(run)
    newest = last or first
    if newest is None:
        return ""
    value, more = percent(newest["accuracy"]), []
    if first and last:
        gain = last["accuracy"] - first["accuracy"]
        tone = "gain" if gain >= 0 else "gain down"
        value = f"{percent(first['accuracy'])} &#8594; {value}"
        value += f'<span class="{tone}">{points(gain)}</span>'
    if last and last.get("stage") == "interval":
        more.append(f"so far, at iteration {last['iteration']}")
    count = number(newest, "problems")
    if count:
        low, high = wilson(newest["accuracy"], int(count))
        more.append(f"{compact(count)} problems, 95% interval {percent(low)} to {percent(high)}")
    return _fact("Held-out accuracy", value, "; ".join(more), hero=True)


def _alarm(run: Run, error: np.ndarray) -> str:
    """Say how many iterations were past the alarm of the settings, or the median without one."""
    level = number(run.settings.get("train") or {}, "ratio_alarm")
    if not level:
        return f"median {np.median(error):.1e}"
    over = int(np.sum(error > level))
    return f"{over} of {len(error)} iterations past {level:g}"


def _alarms(run: Run) -> dict[str, str]:
    """Return the iterations in which each alarm was on, such as `3, 7-9`."""
    spans: dict[str, str] = {}
    for key in sorted({key for row in run.rl for key in row if key.startswith("alarm/")}):
        iterations, values = series(run.rl, key)
        on = iterations[values > 0].astype(int)
        parts = np.split(on, np.flatnonzero(np.diff(on) > 1) + 1)
        shown = [f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts if len(p)]
        if shown:
            more = [f"and {len(shown) - SPANS} more"] if len(shown) > SPANS else []
            spans[key.removeprefix("alarm/").replace("_", " ")] = ", ".join(shown[:SPANS] + more)
    return spans


def _planned(run: Run, section: str) -> str:
    total = number(run.settings.get(section) or {}, "iterations")
    return f"of {compact(total)} planned" if total else ""


def _fact(name: str, value: str, more: str, *, hero: bool = False) -> str:
    kind = "card fact hero" if hero else "card fact"
    return (
        f'<div class="{kind}"><div class="name">{name}</div>'
        f'<div class="value">{value}</div><div class="more">{more}</div></div>'
    )


def _figures(run: Run) -> Iterator[str]:
    """Yield the figures, each in both themes; the browser shows the one that fits."""
    dark = draw_figures(run, DARK)
    for name, light in draw_figures(run).items():
        title, caption = CAPTIONS[name]
        yield f"""<h2>{title}</h2><figure class="card"><picture>
<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark[name])}">
<img alt="{title} figure" src="{_data_uri(light)}"></picture>
<figcaption>{caption}</figcaption></figure>"""


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _evaluations(run: Run) -> str:
    rows = [
        (
            str(row["iteration"]),
            str(row.get("stage", "")),
            _shown(row, "accuracy", percent),
            _shown(row, "reward/mean", compact),
            _shown(row, "problems", compact),
            _shown(row, "time/evaluation", duration),
        )
        for row in run.evaluations
    ]
    names = ("iteration", "stage", "accuracy", "mean reward", "problems", "time")
    return _table("Evaluations", names, rows, opened=True)


def _metrics(title: str, rows: Sequence[Row]) -> str:
    """Return first, last, smallest and largest value of every metric, also unknown ones."""
    keys = sorted({key for row in rows for key in row} - {"phase", "iteration"})
    table = []
    for key in keys:
        values = series(rows, key)[1]
        if len(values):
            ends = values[0], values[-1], values.min(), values.max()
            table.append((key, *(compact(float(value)) for value in ends)))
    return _table(f"{title}: all metrics", ("metric", "first", "last", "lowest", "highest"), table)


def _shown(row: Row, key: str, form: Any) -> str:
    value = number(row, key)
    return "" if value is None else form(value)


def _table(
    title: str, names: Sequence[str], rows: Sequence[Sequence[str]], *, opened: bool = False
) -> str:
    """Return a folding table whose columns after the first hold numbers; empty without rows."""
    if not rows:
        return ""
    head = "".join(f"<th{' class=n' if i else ''}>{n}</th>" for i, n in enumerate(names))
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if i else ''}>{safe(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"""<details class="card"{" open" if opened else ""}><summary>{title}</summary>
<div class="scroll"><table><tr>{head}</tr>{body}</table></div></details>"""


def _settings(run: Run) -> str:
    known = {line.key: line for line in describe(Settings)}
    values = flatten(run.settings, whole=known)
    if not values:
        return ""
    lines = [_setting(key, value, known.get(key)) for key, value in values.items()]
    return f"""<details class="card"><summary>Settings</summary>
<p class="quiet">Highlighted values differ from the default.</p><div class="scroll">
<table><tr><th>setting</th><th>value</th><th>default</th><th>meaning</th></tr>
{"".join(lines)}</table></div></details>"""


def _setting(key: str, value: Any, line: Described | None) -> str:
    changed = line is None or value != line.default
    default = "" if line is None else written(line.default)
    unit = f" [{line.unit}]" if line and line.unit else ""
    meaning = "" if line is None else line.help + unit
    cells = f"<td><code>{safe(key)}</code></td><td><code>{safe(written(value))}</code></td>"
    cells += f'<td class="quiet"><code>{safe(default)}</code></td>'
    return (
        f'<tr{" class=set" if changed else ""}>{cells}<td class="quiet">{safe(meaning)}</td></tr>'
    )
