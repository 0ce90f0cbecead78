"""The columns of supervised data: which of them hold what, under the names that people use."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agrpo_megatron.tasks.data import Row, check_roles, has_column, listed

LISTS = ("messages", "conversations")  # columns that hold all turns
PROMPTS = ("prompt", "question", "instruction", "query", "problem")
REPLIES = ("completion", "response", "answer", "output", "solution")
EXTRA = ("input", "system", "history")  # optional columns, read where they exist
ROLES = ("messages", "prompt", "reply", *EXTRA)  # keys of `columns`
SHAPES = (
    "messages, conversations, prompt and completion, prompt and response, question and answer, "
    "or instruction and output"
)


@dataclass(frozen=True)
class Shape:
    """The columns that are read of every row of a source, by role (see `ROLES`)."""

    columns: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        """Return the columns, in small letters."""
        return set(self.columns.values())

    @property
    def text(self) -> str:
        """Return what a note says of it."""
        given = [column for role, column in self.columns.items() if role not in EXTRA]
        extra = [column for role, column in self.columns.items() if role in EXTRA]
        return " and ".join(given) + (f" with {', '.join(extra)}" if extra else "")


def find_shape(names: Iterable[str], chosen: Mapping[str, str], *, key: str) -> Shape:
    """Return the columns to read.

    Args:
        names: of all columns of a source.
        chosen: columns by role, where the user named them.
        key: the setting of the columns, for errors.

    Raises:
        ValueError: a role is unknown, no known columns are there, or several could be meant.
    """
    row = dict.fromkeys(names)
    check_roles(chosen, ROLES, row, key=key)
    main = {role: column.casefold() for role, column in chosen.items() if role not in EXTRA}
    if not main:
        lists = [name for name in LISTS if has_column(row, name)]
        main = {"messages": lists[0]} if lists else _pair(row, key=key)
    elif set(main) not in ({"messages"}, {"prompt", "reply"}):
        raise ValueError(
            f"{key}={dict(chosen)} must name the column of messages, or those of prompt and reply"
        )
    extra = {role: role for role in EXTRA if has_column(row, role)}
    extra |= {role: column.casefold() for role, column in chosen.items() if role in EXTRA}
    if "messages" in main:
        extra = {role: column for role, column in extra.items() if role == "system"}
    taken = set(main.values())
    return Shape({**main, **{role: col for role, col in extra.items() if col not in taken}})


def _pair(row: Row, *, key: str) -> dict[str, str]:
    """Return the columns of prompt and reply under the names that people give them."""
    found = [[name for name in names if has_column(row, name)] for names in (PROMPTS, REPLIES)]
    if all(len(names) == 1 for names in found):
        return {"prompt": found[0][0], "reply": found[1][0]}
    if has_column(row, "chosen") and has_column(row, "rejected"):
        raise ValueError("chosen and rejected are columns of preference pairs; set sft.loss=vrpo")
    several = any(len(names) > 1 for names in found) and all(found)
    why = "several of its columns could be meant" if several else f"none of {SHAPES} is there"
    raise ValueError(
        f"the columns are {listed(row)}: {why}; name them, as {key}={{prompt: ask, reply: text}}"
    )
