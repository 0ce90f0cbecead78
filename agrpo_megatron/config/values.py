"""One value of a setting: its type, its range and its text. Imports neither torch nor Megatron."""

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

# The range of a setting that declares none: C's int, and normal numbers of float32.
MOST_INT = 2**31 - 1
MOST_FLOAT, LEAST_FLOAT = 3.4e38, 1.2e-38
MOST_SECONDS = 2_000_000  # poll() counts milliseconds in C's int
MOST_SEED = 2**63 - 1  # also of any integer that is passed on by name
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def checked(key: str, value: Any, hint: Any, meta: Mapping[str, Any]) -> Any:
    """Return a value as its setting's type, or raise a ValueError that names key and value."""
    if value is None and type(None) in _options(hint):
        return None
    if value is None:
        raise ValueError(f"{key} is empty; it must be {type_name(hint)}")
    for option in _options(hint):
        if (converted := _convert(key, value, option)) is not None:
            _check_range(key, converted, meta)
            return converted
    said, needed, fix = f"{value!r}", type_name(hint), ""
    if isinstance(value, bool):
        said = f"{text(value)} (YAML reads yes, no, on and off as true and false)"
        if choices := meta.get("choices"):
            needed = f"one of {', '.join(map(str, choices))}"
    if str in _options(hint) and isinstance(value, int | float) and not meta.get("choices"):
        fix = "; write it in quotes"
    raise ValueError(f"{key}={said} has the wrong type; it must be {needed}{fix}")


def type_name(hint: Any) -> str:
    """Return the name of a setting's type."""
    names: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false"}
    names |= {str: "text", list[int]: "a list of integers", list[str]: "a list of texts"}
    names |= {type(None): "null"}
    options = sorted(_options(hint), key=lambda option: option is type(None))
    names |= {option: option for option in options if isinstance(option, str)}
    others = {option: "a list" for option in options if typing.get_origin(option) is list}
    return " or ".join({**others, **names}.get(option, "a mapping") for option in options)


def text(value: object) -> str:
    """Return a value as the user writes it."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """Return the end of an error on an unknown value: the nearest known one, or nothing."""
    nearest = difflib.get_close_matches(str(value).lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, and the words of a `Literal` in it, in their order."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    parts = typing.get_args(hint) if is_union else (hint,)
    words = {part: typing.get_args(part) for part in parts if _is_literal(part)}
    return tuple(option for part in parts for option in words.get(part, (part,)))


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Return `value` as `hint`, or None if it does not fit (YAML reads 1e-4 as text).

    Args:
        hint: a type, or the only text that fits.
    """
    if isinstance(hint, str):
        return value if value == hint else None
    if hint in (bool, int, str):
        fits = isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
        return value if fits else None
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (OverflowError, TypeError, ValueError):
            return None
    origin = typing.get_origin(hint)
    if origin is list and isinstance(value, list):
        kinds = _options(*typing.get_args(hint))
        tried = [[_convert(key, item, kind) for kind in kinds] for item in value]
        items = [next((i for i in item if i is not None), None) for item in tried]
        return None if None in items else items
    return _passed(key, value) if origin is dict and isinstance(value, Mapping) else None


def _passed(key: str, value: Any) -> Any:
    """Check a value that is passed on by name, whose type is not declared; 1e-4 is a number."""
    if isinstance(value, Mapping):
        return {name: _passed(f"{key}.{name}", part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_passed(key, part) for part in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        most = MOST_FLOAT if isinstance(value, float) else MOST_SEED
        _check_number(key, value, low=-most, high=most)
    elif value is not None and not isinstance(value, bool | str):
        raise ValueError(f"{key}={value!r} has the wrong type; write it in quotes")
    return value


def _check_range(key: str, value: Any, meta: Mapping[str, Any]) -> None:
    choices = meta["choices"]
    if choices and value not in choices:
        known = [str(choice) for choice in choices]
        hint = did_you_mean(value, known)
        raise ValueError(f"{key}={value} must be one of {', '.join(known)}{hint}")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool):
            _check_number(key, number, low=meta["low"], high=meta["high"])


def _check_number(key: str, number: float, *, low: float | None, high: float | None) -> None:
    most = MOST_FLOAT if isinstance(number, float) else MOST_INT
    low, high, rule = -most if low is None else low, most if high is None else high, ""
    if isinstance(number, float) and not math.isfinite(number):
        rule = "a finite number"
    elif not low <= number <= high:
        rule = f"at least {low}" if number < low else f"at most {high}"
    elif 0 < abs(number) < LEAST_FLOAT:
        rule = f"0, or at least {LEAST_FLOAT}: float32 has no smaller numbers"
    if rule:
        raise ValueError(f"{key}={number} must be {rule}")
