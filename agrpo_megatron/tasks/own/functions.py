"""Rewards that are Python functions of the user, called with what their parameters name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.own_code import find_function
from agrpo_megatron.tasks.rewards.extract import Fields

COMPLETION, COMPLETIONS, PROMPT, PROMPTS = "completion", "completions", "prompt", "prompts"


@dataclass(frozen=True)
class Function:
    """A reward of the user: a function of a completion, and of fields of its row.

    A parameter `completion` gets the text, every other one the field of its name: `prompt`,
    `answer`, or a column. A function with a parameter `completions` is called as TRL calls one:
    with a list of one for each, and with all columns if it takes `**`; it returns a list of one.
    """

    function: Callable[..., Any]
    needed: tuple[str, ...]  # parameters without a default
    optional: tuple[str, ...]
    takes_all: bool  # it has `**`
    takes_lists: bool
    file: str
    said: str  # the setting, for errors

    def __call__(self, completion: str, row: Fields) -> Any:
        """Return what the function makes of one completion."""
        if not self.takes_lists:
            return self.function(**self._taken({**row, COMPLETION: completion}))
        is_chat = not isinstance(row.get(PROMPT), str)
        text = [{"role": "assistant", "content": completion}] if is_chat else completion
        columns = {name: value for name, value in row.items() if name != PROMPT}
        taken = self._taken({**columns, PROMPTS: row.get(PROMPT), COMPLETIONS: text})
        return _of_one(self.function(**{name: [value] for name, value in taken.items()}))

    def check(self, row: Fields) -> None:
        """Check that a row has what the function needs.

        Raises:
            ValueError: it has not.
        """
        own = (COMPLETIONS, PROMPTS) if self.takes_lists else (COMPLETION,)
        lacking = [name for name in self.needed if name not in (*own, *row)]
        if lacking:
            raise ValueError(
                f"{self.said} takes {', '.join(lacking)}, and the first row has no such field, but "
                f"{', '.join(row)}; name parameters as columns, or give them defaults"
            )

    def _taken(self, known: Fields) -> Fields:
        names = known if self.takes_all else (*self.needed, *self.optional)
        return {name: known[name] for name in names if name in known}


def find_reward(name: str, *, said: str) -> Function:
    """Return the reward that `FILE.py:FUNCTION` names.

    Raises:
        ValueError: there is no such function, or it cannot be called with names.
    """
    function = find_function(name, said=said)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(f"{said}: its parameters cannot be read; give a def") from None
    kinds = {parameter.kind for parameter in parameters}
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [parameter.name for parameter in named]
    is_usable = COMPLETION in names or COMPLETIONS in names
    if not is_usable or inspect.Parameter.POSITIONAL_ONLY in kinds:
        raise ValueError(
            f"{said} takes ({', '.join(map(str, parameters))}); write def "
            f"{name.partition(':')[2]}(completion, answer), with columns as further parameters, or "
            "(completions, **columns) as for TRL"
        )
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{said} is async; write a plain def: it runs in a worker process")
    return Function(
        function,
        tuple(p.name for p in named if p.default is p.empty),
        tuple(p.name for p in named if p.default is not p.empty),
        inspect.Parameter.VAR_KEYWORD in kinds,
        COMPLETIONS in names,
        name.partition(":")[0],
        said,
    )


def _of_one(made: Any) -> Any:
    """Return the only reward of a list of rewards."""
    made = made.tolist() if hasattr(made, "tolist") else made
    if not isinstance(made, list | tuple) or len(made) != 1:
        raise TypeError(f"it returned {made!r:.80} for one completion, not a list of one number")
    return made[0]
