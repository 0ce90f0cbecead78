"""Tables for the terminal: the settings reference, and rows of results."""

import difflib
import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agrpo_megatron.config.schema import Described
from agrpo_megatron.reports.text import compact, written


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
    for name, members in itertools.groupby(chosen, key=_section):
        console.print(_reference(name, list(members)))
        console.print()


def overview_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Return rows of results as a table; columns are the keys, in order of appearance."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        numeric = all(isinstance(row.get(column, 0), int | float) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left", header_style="bold")
    for row in rows:
        table.add_row(*(_value(row.get(column)) for column in columns))
    return table


def markdown_table(rows: Sequence[Mapping[str, str]], left: Container[str]) -> str:
    """Return rows of the same columns as a Markdown table; columns not in `left` align right."""
    names = list(rows[0])
    rules = ["---" if name in left else "---:" for name in names]
    table = [names, rules, *(list(row.values()) for row in rows)]
    lines = (" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in table)
    return "".join(f"| {line} |\n" for line in lines)


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


def _section(setting: Described) -> str:
    return setting.key.rpartition(".")[0]


def _value(value: Any) -> Text:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Text(compact(value))
    return Text("" if value is None else str(value))
