"""The report of a run: one self-contained HTML file, in light and dark."""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from agrpo_megatron.config.schema import describe
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.reports.page.completions import prompts
from agrpo_megatron.reports.page.provenance import attempts, changed, made_by, times
from agrpo_megatron.reports.plots.figures import draw_figures
from agrpo_megatron.reports.plots.style import DARK
from agrpo_megatron.reports.read import (
    Row,
    Run,
    accuracy_interval,
    after,
    before,
    ratio_alarm,
    read_run,
    series,
    time_totals,
)
from agrpo_megatron.reports.text import compact, duration, number, percent, points, written
from agrpo_megatron.runs.metrics import find_metric

CAPTIONS = {
    "learning": (
        "Learning",
        "Faint lines are single iterations, strong lines their running mean. Held-out problems are "
        "never trained on.",
    ),
    "policy": (
        "Policy",
        "Rollout and training run the same modules on the same weights, so the policy ratio of a "
        "first update is 1 up to rounding; its distance from 1 should stay far below the alarm. "
        "With one update an iteration the loss is about 0 by construction: advantages of a group "
        "sum to 0. Its gradient is not 0.",
    ),
    "sampler": (
        "Sampler",
        "Live steps are the denoising steps of a completion that can be drawn for training. A "
        "rollout has no advantage where all completions of its group earn the same reward.",
    ),
    "denoising": (
        "Denoising",
        "Each line is a part of every completion's denoising steps, from first (pale) to last "
        "(strong).",
    ),
    "time": (
        "Time",
        "Seconds by part of an iteration; other is the remainder. The bars on the "
        "right name the colours.",
    ),
    "timeline": (
        "Timeline",
        "When the parts of some iterations ran, by the host's clock; a dashed line begins an "
        "iteration. Scoring is the part of an update that computes log-probabilities without "
        "gradient. Thin bars are rewards that workers or services graded in the background.",
    ),
}
EVALUATION_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {  # metric and form by name
    "accuracy": ("accuracy", percent),
    "mean reward": ("reward/mean", compact),
    "problems": ("problems", compact),
    "time": ("timing/evaluation", duration),
}
SPANS = 4  # stretches of iterations that an alarm names


def write_report(run_dir: Path) -> list[Path]:
    """Write the figures of a run, finished or under way, and its `report.html`; return the paths.

    Raises:
        ValueError: the directory holds no metrics.
    """
    run = read_run(run_dir)
    pictures = draw_figures(run)
    folder, page = run_dir / "figures", run_dir / "report.html"
    folder.mkdir(exist_ok=True)
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    page.write_text(_page(run, pictures), encoding="utf-8")
    return [*(folder / f"{name}.png" for name in pictures), page]


def environment() -> Environment:
    """Return the templates of pages."""
    return Environment(
        loader=PackageLoader("agrpo_megatron.reports.page", ""),
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def encoded(png: bytes) -> str:
    """Return a picture as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _page(run: Run, pictures: Mapping[str, bytes]) -> str:
    named = {"task": "task.name", "model family": "model.family", "seed": "run.seed"}
    parts = [(name, run.settings.get(key)) for name, key in named.items()]
    phases = (("Reinforcement learning", "rl", run.rl), ("Supervised", "sft", run.sft))
    settings = list(_settings(run))
    template = environment().get_template("page.html.j2")
    return template.render(
        name=run.path.resolve().name,
        subtitle=", ".join(f"{name} {value}" for name, value in parts if value is not None),
        held_out=_held_out(run),
        facts=_facts(run),
        figures=_figures(run, pictures),
        prompts=prompts(run),
        tables=[
            _evaluations(run),
            changed(run),
            *(_metrics(*phase) for phase in phases),
            attempts(run),
        ],
        settings=settings,
        changed_settings=[row[:3] for row in settings if row[-1]],
        broken=run.unreadable_lines,
    )


def _printable(value: object) -> object:
    """Return text without control, escape or direction-changing characters."""
    if isinstance(value, Markup) or not isinstance(value, str) or value.isprintable():
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in value)


def _facts(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield (name, value, remark) of the headline numbers that the run has."""
    if run.rl:
        yield ("RL iterations", str(run.rl[-1]["iteration"]), _planned(run, "train"))
    if source := run.settings.get("train.from_rollouts"):
        yield ("Rollouts replayed", str(source), "sampled by the weights of that run")
    if run.sft:
        yield ("SFT iterations", str(run.sft[-1]["iteration"]), _planned(run, "sft"))
    totals = time_totals(run)
    yield ("Time", duration(sum(totals.values())), "training and evaluation")
    made = {**times(run), **made_by(run)}
    for name in ("wall time", "GPU-hours", "CPU-hours"):
        if name in made:
            yield (name[0].upper() + name[1:], made[name], "all attempts, start-up included")
    if "commit" in made:
        yield ("Commit", made["commit"], f"{made['devices']} on {made['host']}")
    speed = series(run.rl or run.sft, "perf/tokens_per_second")[1]
    if len(speed):
        yield ("Tokens per second", compact(float(np.median(speed))), "median iteration")
    error = series(run.rl, "ratio/max_error")[1]
    if len(error):
        most = series(run.rl, "ratio/p99_error")[1]
        share = f"99 % of tokens within {most.max():.1e}; " if len(most) else ""
        yield ("Policy ratio error", f"{error.max():.1e}", f"largest; {share}{_alarm(run, error)}")
    if spans := _alarms(run):
        named = "; ".join(f"{name}: {span}" for name, span in spans.items())
        yield ("Alarms", str(len(spans)), f"iterations of {named}")
    left_out = series(run.sft + run.rl, "skipped_updates")[1].sum()
    if left_out:
        yield ("Updates left out", compact(left_out), "loss or gradient was not finite")
    sizes = series(run.sft + run.rl, "parameters")[1]
    if len(sizes):
        yield ("Parameters", compact(sizes[-1]), "")


def _held_out(run: Run) -> dict[str, Any] | None:
    """Return the headline: held-out accuracy before and after, and the gain."""
    first, last = before(run), after(run)
    newest = last or first
    if newest is None:
        return None
    shown: dict[str, Any] = {"newest": percent(newest["accuracy"])}
    more = []
    if first and last:
        gain = last["accuracy"] - first["accuracy"]
        shown |= {"first": percent(first["accuracy"]), "gain": points(gain), "is_worse": gain < 0}
    if last and last.get("stage") == "interval":
        more.append(f"so far, at iteration {last['iteration']}")
    count, interval = number(newest, "problems"), accuracy_interval(newest)
    if count and interval:
        low, high = interval
        more.append(f"{compact(count)} problems, 95% interval {percent(low)} to {percent(high)}")
    return shown | {"more": "; ".join(more)}


def _alarm(run: Run, error: np.ndarray) -> str:
    """Return how many iterations exceeded the alarm's level; the median without one."""
    level = ratio_alarm(run)
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
    total = number(run.settings, f"{section}.iterations")
    return f"of {compact(total)} planned" if total else ""


def _figures(run: Run, pictures: Mapping[str, bytes]) -> Iterator[tuple[str, ...]]:
    """Yield title, caption and two data URIs of each figure: for light and for dark pages."""
    dark = draw_figures(run, DARK)
    for name, light in pictures.items():
        yield (*CAPTIONS[name], encoded(light), encoded(dark[name]))


def _evaluations(run: Run) -> dict[str, Any]:
    rows = []
    for row in run.evaluations:
        values = [(number(row, key), form) for key, form in EVALUATION_COLUMNS.values()]
        texts = ["" if value is None else form(value) for value, form in values]
        rows.append((row["iteration"], row.get("stage", ""), *texts))
    names = ("iteration", "stage", *EVALUATION_COLUMNS)
    return {"title": "Evaluations", "names": names, "rows": rows, "opened": True}


def _metrics(title: str, phase: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the values and the meaning of every metric; unknown ones have no meaning."""
    keys = sorted({key for row in rows for key in row} - {"phase", "iteration"})
    table = []
    for key in keys:
        values = series(rows, key)[1]
        if len(values):
            ends = values[0], values[-1], values.min(), values.max()
            metric = find_metric(key, phase=phase)
            table.append((key, *map(compact, ends), metric.meaning if metric else ""))
    names = ("metric", "first", "last", "lowest", "highest", "meaning")
    return {"title": f"{title}: all metrics", "names": names, "rows": table, "explained": True}


def _settings(run: Run) -> Iterator[tuple[str, str, str, str, bool]]:
    """Yield name, value, default, meaning, and whether the value differs from the default."""
    known = {line.key: line for line in describe(Settings)}
    for key, value in run.settings.items():
        default = meaning = ""
        if line := known.get(key):
            default = written(line.default)
            meaning = f"{line.help} [{line.unit}]" if line.unit else line.help
        yield key, written(value), default, meaning, not line or value != line.default
