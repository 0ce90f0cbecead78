"""Read settings: a YAML file, `section.key=value` overrides, and errors that name the fix.

The machinery only; the settings themselves are the dataclasses of `settings`. Imports neither
torch nor Megatron, so that a wrong file is refused in well under a second.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from agrpo_megatron.config.yaml_files import merge, read_chain, read_override

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: tuple[Any, ...] = (),
    low: float | None = None,
    high: float | None = None,
    short: str = "",
) -> Any:
    """Declare one setting of a settings dataclass: default, help text, unit and legal values.

    A section whose settings have a `short` name may also be written as one text, see `from_text`.
    """
    metadata = {"help": help, "unit": unit, "choices": choices, "low": low, "high": high}
    metadata["short"] = short
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type, help: str) -> Any:
    """Declare a section: a settings dataclass inside another."""
    return dataclasses.field(default_factory=cls, metadata={"help": help})


def load[T](cls: type[T], path: str | Path | None, overrides: Iterable[str] = ()) -> T:
    """Build `cls` from a YAML file, its bases, and overrides; check each value separately.

    Raises:
        ValueError: unreadable file, unknown key (names the nearest), wrong type, value or range.
    """
    tree = _read_merged(cls, path) if path is not None else {}
    for override in overrides:
        _apply_override(cls, tree, override)
    return build(cls, tree)


def build[T](cls: type[T], tree: Mapping[str, Any], prefix: str = "") -> T:
    """Build a settings dataclass from nested mappings, checking names, types and ranges."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            raise ValueError(_unknown_key(prefix, str(key), fields))
    values = {}
    for name, value in tree.items():
        key = prefix + name
        if dataclasses.is_dataclass(hints[name]):
            if value is None:
                continue
            value = _as_mapping(hints[name], value, key=key)
            if not isinstance(value, Mapping):
                text = f", or write {_text_form(hints[name])}" if _shorts(hints[name]) else ""
                raise ValueError(
                    f"{key}={value!r} is a section; write {key}: and indent its keys{text}"
                )
            values[name] = build(hints[name], value, f"{key}.")  # type: ignore[arg-type]
        else:
            values[name] = _checked(key, value, hints[name], fields[name].metadata)
    return cls(**values)


def from_text(cls: type, text: str, *, key: str) -> dict[str, Any]:
    """Read a section written as text, such as tp2-sp: short names, each with a number or a switch.

    Returns the named settings only; the others keep their defaults.

    Raises:
        ValueError: an unknown or repeated part; `key` names the setting.
    """
    known, values = _shorts(cls), {}
    for part in text.split("-"):
        match = re.fullmatch(r"([a-z]+)([1-9][0-9]{0,8})?", part)
        field = known.get(match[1]) if match else None
        if match is None or field is None or (match[2] is None) != _is_switch(field):
            raise ValueError(f"{key}={text}: {part!r} is not a part; write {_text_form(cls)}")
        if field.name in values:
            raise ValueError(f"{key}={text}: {match[1]} is written twice; write it once")
        values[field.name] = int(match[2]) if match[2] else True
    return values


def to_yaml(settings: Any) -> str:
    """Return settings as YAML that `load` reads back to an equal value."""
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, width=100)


def flatten(
    tree: Mapping[str, Any], *, whole: Container[str] = (), prefix: str = ""
) -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted name; an empty mapping has none.

    Args:
        whole: dotted names of mappings that are leaves themselves.
    """
    flat = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        is_leaf = not isinstance(value, Mapping) or key in whole
        flat |= {key: value} if is_leaf else flatten(value, whole=whole, prefix=f"{key}.")
    return flat


@dataclasses.dataclass(frozen=True)
class Described:
    """One line of the settings reference."""

    key: str
    type: str
    default: Any
    unit: str
    help: str
    choices: tuple[Any, ...]


def describe(cls: type, prefix: str = "") -> Iterator[Described]:
    """Yield every setting below `cls` with type, default, unit, help and choices."""
    hints = typing.get_type_hints(cls)
    defaults = cls()
    for field in dataclasses.fields(cls):
        hint, meta = hints[field.name], field.metadata
        if dataclasses.is_dataclass(hint):
            yield from describe(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            as_text = f"; as text {prefix[:-1]}={_written(field)}" if meta["short"] else ""
            yield Described(
                prefix + field.name,
                _type_name(hint),
                getattr(defaults, field.name),
                meta["unit"],
                meta["help"] + as_text,
                meta["choices"],
            )


def _read_merged(cls: type, path: str | Path) -> dict[str, Any]:
    """Return a file's content, merged over its bases."""
    tree: dict[str, Any] = {}
    chain = read_chain(path)
    for file, part in chain:
        try:
            build(cls, part)
        except ValueError as error:  # a single file needs no name
            raise ValueError(f"settings file {file}: {error}" if chain[1:] else error) from None
        tree = merge(tree, part, file=file)
    return tree


def _shorts(cls: type) -> dict[str, dataclasses.Field[Any]]:
    fields = dataclasses.fields(cls)
    return {short: field for field in fields if (short := field.metadata.get("short"))}


def _is_switch(field: dataclasses.Field[Any]) -> bool:
    return isinstance(field.default, bool)


def _written(field: dataclasses.Field[Any]) -> str:
    return field.metadata["short"] + ("" if _is_switch(field) else "N")


def _text_form(cls: type) -> str:
    parts = ", ".join(_written(field) for field in _shorts(cls).values())
    return f"any of {parts} (N from 1) joined by -"


def _as_mapping(hint: Any, value: Any, *, key: str) -> Any:
    """Read a section written as text; return other values unchanged."""
    if isinstance(value, str) and dataclasses.is_dataclass(hint) and _shorts(hint):  # type: ignore[arg-type]
        return from_text(hint, value, key=key)  # type: ignore[arg-type]
    return value


def _apply_override(cls: type, tree: dict[str, Any], override: str) -> None:
    key, value = read_override(override)
    *sections, name = key.split(".")
    node, owner = tree, cls
    for depth, part in enumerate(sections, start=1):
        owner = typing.get_type_hints(owner).get(part) if dataclasses.is_dataclass(owner) else None
        if node.get(part) is None:
            node[part] = {}
        node[part] = _as_mapping(owner, node[part], key=".".join(sections[:depth]))
        node = node[part]
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {part} is a value, not a section")
    node[name] = value


def _unknown_key(prefix: str, key: str, fields: Mapping[str, Any]) -> str:
    if nearest := difflib.get_close_matches(key, fields, n=1, cutoff=0.5):
        return f"{prefix}{key} is not a setting; did you mean {prefix}{nearest[0]}?"
    where = f"section {prefix.rstrip('.')}" if prefix else "a settings file"
    return f"{prefix}{key} is not a setting; {where} has {', '.join(fields)}"


def _checked(key: str, value: Any, hint: Any, meta: Mapping[str, Any]) -> Any:
    if value is None and type(None) in _options(hint):
        return None
    if value is None:
        raise ValueError(f"{key} is empty; it must be {_type_name(hint)}")
    for option in _options(hint):
        if (converted := _convert(value, option)) is not None:
            _check_range(key, converted, meta)
            return converted
    raise ValueError(f"{key}={value!r} has the wrong type; it must be {_type_name(hint)}")


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` as `hint`, or None if it does not fit (YAML reads 1e-4 as text)."""
    if hint in (bool, int, str):
        fits = isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
        return value if fits else None
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            return None
    origin = typing.get_origin(hint)
    if origin is list and isinstance(value, list):
        items = [_convert(item, *typing.get_args(hint)) for item in value]
        return None if None in items else items
    return _with_numbers(value) if origin is dict and isinstance(value, Mapping) else None


def _with_numbers(value: Any) -> Any:
    """Read 1e-4 as a number in passed-through settings, which declare no type."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(part) for key, part in value.items()}
    is_number = isinstance(value, str) and _EXPONENT.fullmatch(value)
    return float(value) if is_number else value


def _check_range(key: str, value: Any, meta: Mapping[str, Any]) -> None:
    choices, low, high = meta["choices"], meta["low"], meta["high"]
    if choices and value not in choices:
        nearest = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{key}={value} must be one of {', '.join(map(str, choices))}{hint}")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if low is not None and not value >= low:
        raise ValueError(f"{key}={value} must be at least {low}")
    if high is not None and not value <= high:
        raise ValueError(f"{key}={value} must be at most {high}")


def _type_name(hint: Any) -> str:
    names: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false"}
    names |= {str: "text", list[int]: "a list of integers", list[str]: "a list of texts"}
    names |= {type(None): "null"}
    options = sorted(_options(hint), key=lambda option: option is type(None))
    return " or ".join(names.get(option, "a mapping") for option in options)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
