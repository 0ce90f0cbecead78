"""Build Megatron's records from our values and from settings that are passed on by name."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from agrpo_megatron.config.values import text


def megatron_record[Record](
    cls: type[Record], values: Mapping[str, Any], passed: Mapping[str, Any], *, key: str
) -> Record:
    """Build a record of Megatron's; `passed` overrides `values`.

    Args:
        key: the setting that holds `passed`.

    Raises:
        ValueError: Megatron refuses a value, or the record has no such field.
    """
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name, value in passed.items():
        said = f"{key}.{name}={text(value)}"
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            fix = f"did you mean {key}.{near[0]}?" if near else "leave it out"
            raise ValueError(f"{said}: Megatron's {cls.__name__} has no field of this name; {fix}")
        if not _fits(value, hints[name]):
            raise ValueError(f"{said}: Megatron wants {_hint_text(hints[name])}")
    try:
        return cls(**{**values, **passed})
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        said = f"{key}={dict(passed)}: " if passed else ""
        raise ValueError(f"{said}Megatron refuses it: {error}") from None


def _fits(value: object, hint: Any) -> bool:
    """Whether a value of a settings file is of a field's type."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, int | float)
    if (origin or hint) in (list, tuple):
        return isinstance(value, list | tuple)
    return isinstance(hint, type) and isinstance(value, hint)


def _hint_text(hint: Any) -> str:
    """Return a field's type as text: the choices of a literal, else the type's name."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_hint_text, options))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(text, options))
    names = {type(None): "null", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(hint) or {str: "text"}.get(hint) or getattr(hint, "__name__", str(hint))
