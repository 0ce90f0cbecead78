"""Rows of a source: their columns, the problems made of them, and leaks between splits."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from agrpo_megatron.tasks.base import Task
from agrpo_megatron.tasks.rewards.latex import is_equivalent
from agrpo_megatron.types import Chat, Message, Problem, Prompt

type Row = dict[str, Any]


def convert_rows[T](
    rows: Iterable[tuple[int, Row]], make: Callable[[Row], T], *, key: str, source: str
) -> list[tuple[int, T]]:
    """Convert numbered rows, to problems for example.

    Raises:
        ValueError: a row lacks a column or has a wrong value; the message names the row.
    """
    made: list[tuple[int, T]] = []
    for number, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError("must hold one object with the columns as keys")
            made.append((number, make(row)))
        except KeyError as error:
            said = f"{key}={source}, row {number}: no column {error.args[0]}; it has {listed(row)}"
            raise ValueError(said) from None
        except (ValueError, RecursionError) as error:  # of a deeply nested value
            raise ValueError(f"{key}={source}, row {number}: {error}") from None
    return made


def without_repeats(found: Iterable[tuple[int, Problem]]) -> tuple[list[Problem], list[str]]:
    """Return the first problem of each key, and notes that count the rest and their answers."""
    first: dict[str, tuple[int, Problem]] = {}
    repeated, unlike = 0, []
    for row, problem in found:
        other_row, other = first.setdefault(problem.key, (row, problem))
        repeated += other is not problem
        theirs, mine = (p.fields.get("answer", p.fields.get("solution")) for p in (other, problem))
        if mine != theirs and not is_equivalent(str(mine), str(theirs)):
            unlike.append(f"rows {other_row} and {row}: {theirs!r:.40} and {mine!r:.40}")
    notes = [f"{repeated} repeated problems left out"] if repeated else []
    if unlike:
        notes.append(f"{len(unlike)} of them contradict the row kept, such as {unlike[0]}")
    return [problem for _, problem in first.values()], notes


def without_leaks(
    train: Sequence[Problem],
    held_out: Sequence[Problem],
    *,
    task: Task,
    holder: Task,
    name: str,
    by: str = "",
) -> tuple[Sequence[Problem], list[str]]:
    """Remove held-out problems from a task's training problems; return the rest, and notes.

    `holder` is the task of `held_out`: in a mixture, another part; `by` names it in errors.

    Raises:
        ValueError: a leak with task.leaks=refuse, or no training problem is left.
    """
    taken = {task.leak_key(problem, holder) for problem in held_out}
    kept = [problem for problem in train if task.leak_key(problem, holder) not in taken]
    if len(kept) == len(train):
        return kept, []
    found = f"{len(train) - len(kept)} of {len(train)} training problems are also held out{by}"
    leaks = task.settings.leaks
    if leaks == "keep":
        return train, [f"{name}: {found}; KEPT (task.leaks=keep)"]
    if leaks == "refuse":
        raise ValueError(f"task {name}: {found}; use task.leaks=drop, or another file")
    if not kept:
        raise ValueError(
            f"task {name}: all training problems are also held out{by}; use "
            "another file for task.options.train, or none to evaluate only"
        )
    return kept, [f"{name}: {found}; left out"]


def one_line(error: object) -> str:
    """Return the message of a library's error as one short line of printable characters."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Iterable[object]) -> str:
    """Return the names of columns, for an error."""
    return one_line(", ".join(map(str, names)) or "none")


def check_roles(
    chosen: Mapping[str, Any], roles: Sequence[str], names: Iterable[str], *, key: str
) -> None:
    """Check the columns by role that the user chose.

    Args:
        names: of all columns of a source.
        key: the setting, for errors.

    Raises:
        ValueError: a role is unknown, or a column is not there.
    """
    row = dict.fromkeys(names)
    for role, column in chosen.items():
        if role not in roles or not isinstance(column, str):
            raise ValueError(
                f"{key}.{role}={column!r}: give a column for any of {', '.join(roles)}"
            )
        if not has_column(row, column.casefold()):
            raise ValueError(f"{key}.{role}={column}: there is no such column, but {listed(row)}")


def messages_of(prompt: Prompt) -> Sequence[Message]:
    """Return the messages of a prompt; one of text is a turn of the user."""
    return prompt.messages if isinstance(prompt, Chat) else (Message("user", prompt),)


def said_text(messages: Iterable[Message]) -> str:
    """Return turns as one text, without system messages and differences in white space."""
    return " ".join("\n".join(m.content for m in messages if m.role != "system").split())


def optional_column(row: Row, *names: str) -> Any:
    """Return a row's value in the first of `names` that it has, in any letter case, or None.

    Blank text, NaN and an empty list are None: tables write a missing value so.
    """
    found = (_cell(row, name) for name in names)
    return next((value for value in found if not _is_missing(value)), None)


def first_column(row: Row, *names: str) -> Any:
    """Return the same as `optional_column`; raise an error instead of returning None."""
    value, either = optional_column(row, *names), " or ".join(names)
    if value is None and has_column(row, *names):
        raise ValueError(f"column {either} is empty")
    if value is None:
        raise KeyError(either)
    return value


def has_column(row: Row, *names: str) -> bool:
    """Return whether a row has one of `names`, in any letter case; its value may be missing."""
    return any(str(column).casefold() in names for column in row)


def text_column(row: Row, *names: str) -> str:
    """Return the text in the first of `names` that a row has."""
    value = first_column(row, *names)
    return valid_text(value, said=f"column {' or '.join(names)} holds")


def valid_text(value: Any, *, said: str) -> str:
    """Return a value that is text, without a half of a character.

    Args:
        said: what holds it, for errors: "column answer holds".

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, str):
        raise ValueError(f"{said} {value!r:.80}, which is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{said} {value[error.start]!r} at character {error.start + 1}, half of a character or "
            "a byte that is not UTF-8; remove it"
        ) from None
    return value


def answer_column(row: Row, name: str) -> str | None:
    """Return the one answer in a column, or None: text, a number, or a list that holds only it."""
    value = optional_column(row, name)
    if isinstance(value, list | tuple) and len(value) == 1:
        value = optional_column({name: value[0]}, name)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        value = f"{Decimal(str(value)):f}"
        value = value.rstrip("0").rstrip(".") if "." in value else value
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise wrong_value(value, "one answer", name)
    return None if value is None else text_column({name: str(value)}, name)


def to_whole(value: Any, *names: str) -> int:
    """Return a column's value as a whole number."""
    try:
        number = None if isinstance(value, bool) else int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not isinstance(value, str) and value != number:
        raise wrong_value(value, "a whole number", *names)
    return number


def wrong_value(value: Any, what: str, *names: str) -> ValueError:
    return ValueError(f"column {' or '.join(names)} holds {value!r:.80}, which is not {what}")


def _cell(row: Row, name: str) -> Any:
    found = [column for column in row if str(column).casefold() == name]
    if len(found) > 1:
        raise ValueError(f"the columns {' and '.join(found)} differ only in letter case; keep one")
    return row[found[0]] if found else None


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    is_nan = isinstance(value, float | Decimal) and math.isnan(value)
    return value is None or is_nan or isinstance(value, list | tuple) and not value
