"""The columns of `task.name=jsonl`: which of them hold what, under the names that people use."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from agrpo_megatron.tasks.data import (
    Row,
    answer_column,
    check_roles,
    first_column,
    has_column,
    listed,
    text_column,
)
from agrpo_megatron.tasks.rewards.extract import Fields
from agrpo_megatron.tasks.supervised.columns import LISTS, PROMPTS, Shape
from agrpo_megatron.tasks.supervised.rows import to_conversation

KEY = "task.options.columns"
ROLES = ("messages", "prompt", "answer", "solution", "key")
ANSWERS = ("answer", "solution", "target", "completion", "response", "output")
SOLUTION = "solution"
_PLACE = re.compile(r"\{\{|\}\}|\{([^{}\n]+)\}")

type Columns = Mapping[str, str]  # by role, in small letters


def find_columns(names: Iterable[str], chosen: Mapping[str, Any], *, needs_prompt: bool) -> Columns:
    """Return the columns to read, by role: those that the user chose, and known names.

    Args:
        names: of all columns of a source.
        needs_prompt: whether there must be a column of prompts or messages.

    Raises:
        ValueError: a role is unknown, a column is not there, or several could be the prompt.
    """
    row = dict.fromkeys(names)
    check_roles(chosen, ROLES, row, key=KEY)
    if {"messages", "prompt"} <= set(chosen):
        raise ValueError(f"{KEY}: messages and prompt are two forms of a prompt; name one")
    found = {role: column.casefold() for role, column in chosen.items()}

    def known(options: Iterable[str]) -> list[str]:
        return [name for name in options if name not in found.values() and has_column(row, name)]

    if not {"messages", "prompt"} & set(found):
        lists, texts = known(LISTS), known(PROMPTS)
        if lists:
            found["messages"] = lists[0]
        elif len(texts) == 1:
            found["prompt"] = texts[0]
        elif needs_prompt:
            why = f"{' and '.join(texts)} could be the prompt" if texts else "none is a prompt"
            raise ValueError(
                f"the columns are {listed(row)}; {why}; name it, as {KEY}={{prompt: ask}}"
            )
    for role, names_of in (("answer", ANSWERS), ("solution", (SOLUTION,))):
        if role not in found and (there := known(names_of)):
            found[role] = there[0]
    return found


def read_fields(row: Row, columns: Columns, template: str | None) -> Fields:
    """Return the fields of a problem: the row's columns, `prompt`, `answer`, `solution`, `key`.

    The prompt is text or a list of messages; a reply at its end is the solution, and the answer if
    the row has no other one. The answer is None where there is none.

    Raises:
        KeyError: the row lacks a column.
        ValueError: a column holds something else.
    """
    fields = {str(name): None if value != value else value for name, value in row.items()}  # NaN
    column, reply = columns.get("messages") or columns.get("prompt"), ""
    if template is not None:
        prompt = fill(template, row)
    elif isinstance(first_column(row, str(column)), list | tuple):
        prompt, reply = _messages(row, str(column))
    else:
        prompt = text_column(row, str(column))
    answer = answer_column(row, columns["answer"]) if "answer" in columns else reply or None
    solution = columns.get("solution", columns.get("answer", ""))
    known = answer_column(row, solution) if solution else None
    if "key" in columns:
        fields["key"] = first_column(row, columns["key"])
    return {
        **fields,
        "prompt": prompt,
        "answer": answer,
        "solution": known or reply or answer or "",
    }


def fill(template: str, row: Row) -> str:
    """Return a template with the row's columns in place of their names in braces.

    Doubled braces stand for single ones.

    Raises:
        KeyError: the row lacks a column.
    """

    def put(place: re.Match[str]) -> str:
        if place[1] is None:
            return place[0][0]
        value = first_column(row, place[1].casefold())
        return value if isinstance(value, str) else str(value)

    return _PLACE.sub(put, template)


def _messages(row: Row, column: str) -> tuple[list[dict[str, str]], str]:
    """Return the messages before the last reply, and that reply if they end with one."""
    messages = [m._asdict() for m in to_conversation(row, Shape({"messages": column})).messages]
    reply = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else ""
    if not messages:
        raise ValueError(f"column {column} has no message before the reply")
    return messages, reply
