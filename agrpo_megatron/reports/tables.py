"""Rows of results as tables, for the terminal and in Markdown."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from agrpo_megatron.reports.text import compact


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


def _value(value: Any) -> Text:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Text(compact(value))
    return Text("" if value is None else str(value))
