"""YAML files of settings; a file may name a `base` and hold only the differences."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

BASE = "base"

type Tree = dict[str, Any]


class RepeatedKeyError(ComposerError):
    """A mapping has a key twice; YAML would silently keep the last."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping before YAML merges others into it."""
        node = super().compose_mapping_node(anchor)
        known = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in known:
                said = f"{key.value} is written twice; write it once"
                raise RepeatedKeyError(None, None, said, key.start_mark)
            known.add((key.tag, str(key.value)))
        return node


# As in YAML 1.2, a time such as 10:00:00 is a text, not a number to base 60.
_BASE_60 = ("tag:yaml.org,2002:str", re.compile(r"[-+]?[0-9][0-9_]*(:[0-9_.]+)+$"))
_Loader.yaml_implicit_resolvers = {
    first: [_BASE_60, *others] if first in "+-0123456789" else others
    for first, others in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        RepeatedKeyError: a mapping has a key twice.
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, _Loader)


def read_override(override: str) -> tuple[str, Any]:
    """Return key and value of section.key=value; the value is YAML.

    Raises:
        ValueError: the override has another form.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ValueError(f"override {override!r}: write section.key=value, e.g. run.seed=1")
    try:
        return key.strip(), parse_yaml(text) if text else None
    except RepeatedKeyError as error:
        raise ValueError(f"override {override!r}: {error.problem}") from None
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: the value is not valid YAML; quote it") from None


def read_yaml(path: str | Path) -> Tree:
    """Read one YAML mapping.

    Raises:
        ValueError: the file is missing, is not YAML, has a key twice, or holds no mapping.
    """
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise ValueError(f"settings file {path}: {reason}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ValueError(f"settings file {path}{where}: not valid YAML: {problem}") from None
    if not isinstance(tree, dict | None):
        raise ValueError(f"settings file {path}: the top level must be sections, not {tree!r}")
    return tree or {}


def read_chain(path: str | Path) -> list[tuple[Path, Tree]]:
    """Read a file and its bases: the lowest base first, the file itself last.

    Raises:
        ValueError: as `read_yaml`; a base that does not exist or leads back to its own file.
    """
    chain: list[tuple[Path, Tree]] = []
    file = Path(path)
    while True:
        tree = read_yaml(file)
        base = tree.pop(BASE, None)
        chain.insert(0, (file, tree))
        if base is None:
            return chain
        said = f"settings file {file}: base={base}"
        if not isinstance(base, str) or not (file.parent / base).is_file():
            raise ValueError(f"{said} is not a file; name one relative to {file.parent}")
        file = file.parent / base
        if any(file.resolve() == known.resolve() for known, _ in chain):
            raise ValueError(f"{said} leads back to {file}; bases must not form a cycle")


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any], *, file: Path) -> Tree:
    """Return `lower` updated by `upper`; mappings are merged, other values replaced.

    Args:
        file: the file of `upper`, for errors.

    Raises:
        ValueError: keys for a section that the base writes as text, such as parallel: tp2.
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = lower.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge(below, value, file=file)
        elif isinstance(below, Mapping) and value is None:  # an empty section changes nothing
            value = below
        elif isinstance(below, str) and isinstance(value, Mapping):
            raise ValueError(
                f"settings file {file}: {key} is a section here and the text {below!r} in the "
                "base; write both in one form"
            )
        merged[key] = value
    return merged
