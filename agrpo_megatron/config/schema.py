"""Read settings: a YAML file, `section.key=value` overrides, and errors that name the fix.

The machinery only; the settings themselves are the dataclasses of `settings`. Imports neither
torch nor Megatron, so that a wrong file is refused in well under a second.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agrpo_megatron.config.values import MOST_SECONDS, checked, type_name
from agrpo_megatron.config.yaml_files import (
    dump_yaml,
    merge,
    read_chain,
    read_override,
    with_whole_paths,
)

_WRITTEN = "_written"  # attribute of a section, not a setting of it


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
    if unit == "seconds" and high is None:
        high = MOST_SECONDS
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
            values[name] = checked(key, value, hints[name], fields[name].metadata)
    built = cls(**values)
    object.__setattr__(built, _WRITTEN, frozenset(values))
    return built


def rebuilt[T](section: T, name: str) -> T:
    """Return a flat section that code has built, its values checked like those of a file."""
    return build(type(section), dataclasses.asdict(section), f"{name}.")  # type: ignore[call-overload]


def written(section: Any) -> frozenset[str]:
    """Return the names that a section was built with; `dataclasses.replace` forgets them."""
    return getattr(section, _WRITTEN, frozenset())


def changed[T](section: T, **changes: Any) -> T:
    """Return a section with other values, and the same names that it was built with."""
    made = dataclasses.replace(section, **changes)  # type: ignore[type-var]
    object.__setattr__(made, _WRITTEN, written(section))
    return made


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
    return dump_yaml(dataclasses.asdict(settings))


def to_whole_yaml(settings: Any) -> str:
    """Return settings as YAML for any folder: existing files of code and of rows by whole paths."""
    return dump_yaml(with_whole_paths(dataclasses.asdict(settings)))


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
    low: float | None = None
    high: float | None = None


def describe(cls: type, prefix: str = "") -> Iterator[Described]:
    """Yield every setting below `cls` with type, default, unit, help and legal values."""
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
                type_name(hint),
                getattr(defaults, field.name),
                meta["unit"],
                meta["help"] + as_text,
                meta["choices"],
                meta["low"],
                meta["high"],
            )


def describe_sections(cls: type, prefix: str = "") -> dict[str, str]:
    """Return the help of every section below `cls` by its dotted name."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hint := hints[field.name]):
            name = f"{prefix}{field.name}"
            found[name] = field.metadata["help"]
            found |= describe_sections(hint, f"{name}.")  # type: ignore[arg-type]
    return found


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
    if dataclasses.is_dataclass(owner):
        hint = typing.get_type_hints(owner).get(name)
        below = _as_mapping(hint, node.get(name), key=key)
        if dataclasses.is_dataclass(hint) and isinstance(below, dict) and isinstance(value, dict):
            value = merge(below, value, file=Path(override))
    node[name] = value


def _unknown_key(prefix: str, key: str, fields: Mapping[str, Any]) -> str:
    initials = ["".join(word[0] for word in name.split("_")) for name in fields]
    if key.lower() in initials:  # lr is learning_rate
        nearest = [list(fields)[initials.index(key.lower())]]
    else:
        nearest = difflib.get_close_matches(key.lower(), fields, n=1, cutoff=0.5)
    if nearest:
        return f"{prefix}{key} is not a setting; did you mean {prefix}{nearest[0]}?"
    where = f"section {prefix.rstrip('.')}" if prefix else "a settings file"
    return f"{prefix}{key} is not a setting; {where} has {', '.join(fields)}"
