"""YAML files of settings; a file may name a `base` and hold only the differences."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.error import MarkedYAMLError

BASE = "base"
# A file of code, FILE.py[:NAME], or of rows.
_FILE = re.compile(r"([^:]+\.(?:py|jsonl|json|csv|parquet)(?:\.gz)?)((?<=\.py):\w+|)")
WITH_FILES = ("task", "sft", "algorithm", "evaluation")  # sections that name such files
MOST_NESTED = 50

type Tree = dict[str, Any]


class RefusedError(MarkedYAMLError):
    """YAML that would silently become something else, or that no setting can be."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping before YAML merges others into it."""
        node = super().compose_mapping_node(anchor)
        known = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in known:
                said = f"{key.value} is written twice; write it once"
                raise RefusedError(problem=said, problem_mark=key.start_mark)
            known.add((key.tag, str(key.value)))
        return node


class _Dumper(yaml.SafeDumper):
    pass


# As in YAML 1.2, a time such as 10:00:00 is a text, not a number to base 60, so is a date, and
# 010 is ten. The first that matches holds.
_INTEGER, _DATE = "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"
_BASE_60 = ("tag:yaml.org,2002:str", re.compile(r"[-+]?[0-9][0-9_]*(:[0-9_.]+)+$"))
_INTEGERS = (_INTEGER, re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$"))
_Loader.yaml_implicit_resolvers = {
    first: [_BASE_60, _INTEGERS, *(other for other in others if other[0] != _DATE)]
    if first in "+-0123456789"
    else others
    for first, others in _Loader.yaml_implicit_resolvers.items()
}


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = loader.construct_scalar(node).replace("_", "")
    return int(digits, 0 if digits.lstrip("+-")[:2] in ("0b", "0x") else 10)


_Loader.add_constructor(_INTEGER, _integer)
_Dumper.add_implicit_resolver(*_INTEGERS, list("+-0123456789"))  # quotes 08, a number here


def parse_yaml(text: str) -> Any:
    """Parse a YAML text; what an anchor shares is copied, so that a change has one place.

    Raises:
        RefusedError: a mapping has a key twice, or a value cannot be used.
        yaml.YAMLError: the text is not YAML.
    """
    try:
        return _unshared(yaml.load(text, _Loader), MOST_NESTED)
    except (RecursionError, ValueError, LookupError, AttributeError, TypeError):
        problem = "a value is nested too deep, or does not fit its tag"
        raise RefusedError(problem=problem) from None


def _unshared(value: Any, depth: int) -> Any:
    if depth < 0:
        raise RefusedError(problem=f"it is nested over {MOST_NESTED} deep, or contains itself")
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise RefusedError(problem="a text has a character that no file can hold")
    if isinstance(value, dict):
        return {_unshared(k, depth): _unshared(part, depth - 1) for k, part in value.items()}
    return [_unshared(part, depth - 1) for part in value] if isinstance(value, list) else value


def dump_yaml(tree: Any, **options: Any) -> str:
    """Return the text that `parse_yaml` reads back to an equal tree."""
    return yaml.dump(tree, Dumper=_Dumper, **{"sort_keys": False, "width": 100, **options})


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
    except RefusedError as error:
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

    Relative names of code and data files are looked up in the current folder, then in the folder
    of the settings file.

    Raises:
        ValueError: as `read_yaml`; a base that does not exist or leads back to its own file.
    """
    chain: list[tuple[Path, Tree]] = []
    file = Path(path)
    while True:
        tree = _led(read_yaml(file), file.parent)
        base = tree.pop(BASE, None)
        chain.insert(0, (file, tree))
        if base is None:
            return chain
        said = f"settings file {file}: base={base}"
        if not isinstance(base, str) or not os.path.isfile(file.parent / base):
            raise ValueError(f"{said} is not a file; name one relative to {file.parent}")
        file = file.parent / base
        if any(file.resolve() == known.resolve() for known, _ in chain):
            raise ValueError(f"{said} leads back to {file}; bases must not form a cycle")


def with_whole_paths(settings: Tree) -> Tree:
    """Return settings with whole paths of those files of code and of rows that exist."""
    return _of_files(settings, lambda name: os.path.abspath(name) if os.path.exists(name) else name)


def with_file_names(settings: Tree) -> Tree:
    """Return settings whose files of code and of rows have no folders: the same after a move."""
    return _of_files(settings, os.path.basename)


def _of_files(settings: Tree, rename: Callable[[str], str]) -> Tree:
    return {k: _renamed(part, rename) if k in WITH_FILES else part for k, part in settings.items()}


def _led(tree: Any, folder: Path) -> Any:
    """Return a tree in which the names of files that are only in `folder` lead there."""

    def lead(name: str) -> str:
        is_there = not os.path.exists(name) and os.path.isfile(folder / name)
        return str(folder / name) if is_there else name

    return _renamed(tree, lead)


def _renamed(value: Any, rename: Callable[[str], str]) -> Any:
    """Return a tree in which files of code and of rows have other names."""
    if isinstance(value, dict):
        return {name: _renamed(part, rename) for name, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, rename) for part in value]
    named = _FILE.fullmatch(value) if isinstance(value, str) else None
    return value if named is None else f"{rename(named[1])}{named[2]}"


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
