"""References of settings and metrics: for the terminal, and docs/settings.md, docs/metrics.md."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agrpo_megatron.config.schema import Described, describe, describe_sections
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.values import MOST_SECONDS, text
from agrpo_megatron.reports.tables import markdown_table
from agrpo_megatron.reports.text import written
from agrpo_megatron.runs.history.changes import FREE, FROZEN, LOGGED, OF_RL, OF_SFT
from agrpo_megatron.runs.metrics import METRICS
from agrpo_megatron.runs.metrics.record import Metric
from agrpo_megatron.tasks import describe_tasks

SETTINGS_PAGE = """\
# Settings

Written by `agrpo config --markdown`; a test compares the two. A settings file is YAML: a section
has its settings below it, indented. A command line overrides it with `section.key=value`. With
`null` a value is derived, as the help says. "Published" is the value of the paper or of its code,
where the default differs. `agrpo config --section optimizer` prints one section, and
`agrpo config FILE` prints a file with all values filled in.
"""
MAY_CHANGE = {
    "May change, as they alter no number": FREE,
    "May change, and are logged in the run's changes.jsonl": LOGGED,
    "May change until reinforcement learning has its first checkpoint": (*OF_SFT, *OF_RL),
}
FROZEN_TITLE = "May not change, as what was computed before and after would not belong together"
METRICS_PAGE = """\
# Metrics

Written by `agrpo config --metrics --markdown`; a test compares the two, and another that runs log
nothing else. A line of `metrics.jsonl` is one iteration of supervised training (`sft`) or of
reinforcement learning (`rl`), or one evaluation (`eval`). `<part>` in a name stands for any text.
In wandb a name follows its phase: `rl/reward/mean`. "Healthy" is the value in a run that learns,
where one is known.

Look first at `accuracy`, `reward/mean`, `zero_advantage_fraction`, `entropy`, `ratio/max_error`
and `completions/mean_length`. [Troubleshooting](troubleshooting.md) says what to do when they look
wrong.
"""


def settings_reference(
    described: Iterable[Described], console: Console, *, prefix: str = ""
) -> None:
    """Print settings by section: key, type, default, help, unit and choices.

    Raises:
        ValueError: no setting begins with `prefix`; names the nearest section or key.
    """
    every = list(described)
    chosen = [setting for setting in every if setting.key.startswith(prefix)]
    if not chosen:
        names = [s.key for s in every] + [_section(s) for s in every]
        nearest = difflib.get_close_matches(prefix, names, n=1, cutoff=0.3)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"no setting begins with {prefix}{hint}")
    for name, members in _by_section(chosen).items():
        console.print(_reference(name, members))
        console.print()


def settings_page() -> str:
    """Return docs/settings.md."""
    sections = describe_sections(Settings)
    groups = _by_section(describe(Settings))
    index = [
        f"- [`{name}`](#{name.replace('.', '')}): {sections[name]}; {len(own)} settings\n"
        for name, own in groups.items()
        if name
    ]
    index.append(
        "- [top level](#top-level), [what may change when a run goes "
        "on](#what-may-change-when-a-run-resumes) and [options of tasks](#options-of-tasks)\n"
    )
    parts = [SETTINGS_PAGE, "".join(index)]
    parts += [f"## {name or 'top level'}\n\n{_table(own)}" for name, own in groups.items()]
    parts += _changes_page()
    parts.append("## Options of tasks\n\n`agrpo config --tasks` prints them.\n")
    parts += [f"### {name}\n\n{_table(own)}" for name, own in describe_tasks().items() if own]
    return "\n".join(parts)


def changes_reference(console: Console) -> None:
    """Print which settings may change when a run resumes, and why the others may not."""
    for title, names in MAY_CHANGE.items():
        console.print(Text(title, style="bold"))
        console.print(Text("  " + ", ".join(names), style="cyan"), "\n")
    console.print(Text(f"{FROZEN_TITLE}; of several fitting names the longest counts", "bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(ratio=1)
    for name, reason in FROZEN.items():
        table.add_row(Text(name), Text(reason))
    console.print(table)


def _changes_page() -> Iterator[str]:
    """Yield the part of docs/settings.md on runs that resume."""
    yield "## What may change when a run resumes\n"
    yield "`agrpo train RUN KEY=VALUE` resumes a run with other settings.\n"
    yield "`agrpo config --frozen` prints this list.\n"
    for title, names in MAY_CHANGE.items():
        yield f"{title}: {', '.join(f'`{name}`' for name in names)}.\n"
    rows = [{"name": f"`{name}`", "why": reason} for name, reason in FROZEN.items()]
    yield f"{FROZEN_TITLE}; of several fitting names the longest counts:\n"
    yield markdown_table(rows, ("name", "why"))


def metrics_reference(groups: Mapping[str, Sequence[Metric]], console: Console) -> None:
    """Print metrics by group: name, phases, unit, meaning and healthy value."""
    for group, members in groups.items():
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.title, table.title_justify = Text(group, style="bold"), "left"
        table.add_column("metric", style="cyan", overflow="fold")
        table.add_column("phases")
        table.add_column("meaning", ratio=1)
        for metric in members:
            meaning = Text(metric.meaning)
            meaning.append(f" [{metric.unit}]" if metric.unit else "", style="dim")
            meaning.append(f"\nhealthy: {metric.healthy}" if metric.healthy else "", style="green")
            table.add_row(Text(metric.name), " ".join(metric.phases), meaning)
        console.print(table)
        console.print()


def metrics_page() -> str:
    """Return docs/metrics.md."""
    parts = [METRICS_PAGE]
    for group, members in METRICS.items():
        rows = [
            {
                "metric": f"`{metric.name}`",
                "phases": ", ".join(metric.phases),
                "unit": metric.unit,
                "meaning": metric.meaning,
                "healthy": metric.healthy,
            }
            for metric in members
        ]
        parts.append(f"## {group}\n\n{markdown_table(rows, left=rows[0])}")
    return "\n".join(parts)


def _table(members: Sequence[Described]) -> str:
    rows = [
        {
            "setting": f"`{setting.key}`",
            "default": f"`{written(setting.default)}`",
            "unit": setting.unit,
            "values": "; ".join(_values(setting)),
            "help": setting.help.replace("<", "&lt;"),
        }
        for setting in members
    ]
    return markdown_table(rows, left=rows[0])


def _values(setting: Described) -> Iterator[str]:
    """Yield type and range, or the choices."""
    if setting.choices:
        yield ", ".join(f"`{text(choice)}`" for choice in setting.choices)
        return
    yield setting.type
    if setting.low is not None:
        yield f"from {text(setting.low)}"
    if setting.high not in (None, MOST_SECONDS):
        yield f"to {text(setting.high)}"


def _reference(name: str, members: Sequence[Described]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.title, table.title_justify = Text(name or "top level", style="bold"), "left"
    table.add_column("setting", style="cyan", no_wrap=True)
    for column in ("type", "default"):
        table.add_column(column, overflow="fold", max_width=18)
    table.add_column("help", ratio=1)
    for setting in members:
        help_text = Text(setting.help)
        if setting.unit:
            help_text.append(f" [{setting.unit}]", style="dim")
        if setting.choices:
            help_text.append("\n" + " | ".join(map(str, setting.choices)), style="green")
        texts = setting.key, setting.type, written(setting.default)
        table.add_row(*map(Text, texts), help_text)
    return table


def _by_section(described: Iterable[Described]) -> dict[str, list[Described]]:
    """Return settings by their section, sections in order of appearance."""
    groups: dict[str, list[Described]] = {}
    for setting in described:
        groups.setdefault(_section(setting), []).append(setting)
    return groups


def _section(setting: Described) -> str:
    return setting.key.rpartition(".")[0]
