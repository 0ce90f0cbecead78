"""The rules of the house that a machine can check; every message names the file and the rule."""

import ast
import graphlib
import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "agrpo_megatron"

LAYERS = {
    0: ("__init__", "config", "types", "trajectories"),
    1: ("diffusion", "estimators", "tasks", "families", "text", "scaling", "hardware"),
    2: ("runs",),
    3: ("megatron", "checkpoint", "resilience"),
    4: ("rollout",),
    5: ("evaluation",),
    6: ("training", "reports"),
    7: ("launch", "planning", "serving", "benchmark"),
    8: ("cli", "__main__"),
}
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
MEGATRON_CORE_IN = ("megatron/", "checkpoint/", "training/step.py")

# (where, what must not be imported there, why)
FORBIDDEN = [
    ("config/", "torch", "a wrong file is refused before torch loads"),
    ("runs/", "torch", "a wrong file is refused before torch loads"),
    ("tasks/", "torch", "a task is problems, prompts and rewards"),
    ("diffusion/", "megatron", "pure functions of tensors"),
    ("diffusion/", "agrpo_megatron.megatron", "pure functions of tensors"),
    ("estimators/", "megatron", "pure functions of tensors"),
    ("estimators/", "agrpo_megatron.megatron", "pure functions of tensors"),
    ("reports/", "torch", "a report reads a run directory, not a run"),
    ("reports/", "agrpo_megatron.training", "a report reads a run directory, not a run"),
    ("reports/", "agrpo_megatron.rollout", "a report reads a run directory, not a run"),
]

MAX_FILE, MAX_FUNCTION, MAX_NESTING = 300, 60, 3
MAX_MODULES, MAX_FOLDER = 4, 14  # at the package's top; in any folder of the package
UNDOCUMENTED = 6  # a public function longer than this has a docstring
SOURCES = {".py", ".sh", ".sbatch", ".toml", ".yaml", ".yml"}
# Written so that the patterns do not find themselves.
MACHINE = re.compile(
    r"/(?:work|farm|root)/|(?<![\w.~])/home/[a-z]"
    r"|py[p]i\.o[r]g|python[h]osted|registry\.n[p]mjs|deb\.d[e]bian"
)


@cache
def tracked() -> tuple[Path, ...]:
    """Return the project's files: what git tracks or would, or all but hidden folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        hidden = re.compile(r"(^|/)(\.|wandb/|build/|dist/|__pycache__/)")
        paths = [p for p in ROOT.rglob("*") if not hidden.search(p.relative_to(ROOT).as_posix())]
    return tuple(sorted(path for path in paths if path.is_file()))


@cache
def parsed(folder: str) -> tuple[tuple[Path, ast.Module], ...]:
    """Return the Python files below `folder` with their syntax trees."""
    files = [p for p in tracked() if p.suffix == ".py" and p.is_relative_to(ROOT / folder)]
    return tuple((path, ast.parse(path.read_text(encoding="utf-8"))) for path in files)


def house() -> tuple[tuple[Path, ast.Module], ...]:
    """Return the files that rules on size and docstrings hold for."""
    return parsed(PACKAGE) + parsed("tools")


def place(path: Path, node: ast.AST | None = None) -> str:
    """Return where to look, for instance `agrpo_megatron/types.py:12`."""
    line = f":{getattr(node, 'lineno', 0)}" if node is not None else ""
    return f"{path.relative_to(ROOT).as_posix()}{line}"


def inside(path: Path) -> str:
    """Return a path within the package, for instance `diffusion/losses.py`."""
    return path.relative_to(ROOT / PACKAGE).as_posix()


def room(path: Path) -> str:
    """Return the room a file of the package stands in."""
    return inside(path).split("/")[0].removesuffix(".py")


def module_file(path: Path, known: set[Path]) -> Path | None:
    """Return the file of a module, package, or name in one of them; None outside `known`."""
    files = (f for p in (path, path.parent) for f in (p.with_suffix(".py"), p / "__init__.py"))
    return next((file for file in files if file in known), None)


def imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Yield every import, late ones too, as a dotted name; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, package: str) -> bool:
    """Say whether a dotted name is the package or something in it."""
    return f"{name}.".startswith(f"{package}.")


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return a function's lines, without its decorators."""
    return (function.end_lineno or 0) - function.lineno + 1


def nesting(node: ast.AST) -> int:
    """Return how deep blocks stand in blocks; `elif` is no deeper than its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        block = isinstance(child, ast.For | ast.While | ast.If | ast.With | ast.Try | ast.Match)
        orelse = getattr(node, "orelse", None)
        if isinstance(child, ast.If) and isinstance(node, ast.If) and orelse == [child]:
            block = False
        deepest = max(deepest, nesting(child) + block)
    return deepest


def assert_none(rule: str, offenders: list[str]) -> None:
    """Fail with the rule and all who break it."""
    __tracebackhide__ = True
    assert not offenders, f"{rule}:\n  " + "\n  ".join(offenders)


def test_every_room_has_a_layer():
    unknown = {room(path) for path, _ in parsed(PACKAGE)} - set(LAYER_OF)
    assert_none("a new room needs a layer in tests/test_house.py", sorted(unknown))


def test_imports_go_downward():
    offenders = []
    for path, tree in parsed(PACKAGE):
        mine = LAYER_OF.get(room(path), 0)
        for node, name in imports(tree):
            target = name.split(".")[1] if within(name, PACKAGE) and "." in name else "__init__"
            if LAYER_OF.get(target, 0) > mine:
                offenders.append(f"{place(path, node)} (layer {mine}) imports {name}")
    assert_none("imports go downward only", offenders)


def test_rooms_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path, tree in parsed(PACKAGE):
        names = [name.split(".") for _, name in imports(tree) if within(name, PACKAGE)]
        targets = {parts[1] for parts in names if len(parts) > 1 and parts[1] in LAYER_OF}
        graph.setdefault(room(path), set()).update(targets - {room(path)})
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"rooms import each other in a circle: {' <- '.join(error.args[1])}")


def test_files_do_not_import_each_other_in_a_circle():
    paths = {path for path, _ in parsed(PACKAGE)}
    graph: dict[str, set[str]] = {}
    for path, tree in parsed(PACKAGE):
        names = [name for _, name in imports(tree) if within(name, PACKAGE)]
        targets = {module_file(ROOT / name.replace(".", "/"), paths) for name in names}
        graph[place(path)] = {place(file) for file in targets if file is not None}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"files import each other in a circle: {' <- '.join(error.args[1])}")


def test_folders_are_small():
    counts = Counter(path.parent for path, _ in parsed(PACKAGE))
    top = counts.pop(ROOT / PACKAGE)
    assert top <= MAX_MODULES, f"at most {MAX_MODULES} modules at the top of the package, not {top}"
    offenders = [f"{place(path)} has {n} files" for path, n in counts.items() if n > MAX_FOLDER]
    assert_none(f"a folder of the package has at most {MAX_FOLDER} files", offenders)


def test_imports_are_absolute():
    offenders = [
        place(path, node)
        for path, tree in house()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert_none("imports name the package in full", offenders)


def test_megatron_core_is_imported_in_its_rooms_only():
    offenders = [
        f"{place(path, node)} imports {name}"
        for path, tree in parsed(PACKAGE)
        for node, name in imports(tree)
        if within(name, "megatron") and not inside(path).startswith(MEGATRON_CORE_IN)
    ]
    assert_none(f"megatron.core is imported only in {', '.join(MEGATRON_CORE_IN)}", offenders)


@pytest.mark.parametrize(("where", "what", "why"), FORBIDDEN)
def test_forbidden_imports(where, what, why):
    offenders = [
        place(path, node)
        for path, tree in parsed(PACKAGE)
        for node, name in imports(tree)
        if inside(path).startswith(where) and within(name, what)
    ]
    assert_none(f"{where} does not import {what}: {why}", offenders)


def test_the_pure_core_names_no_global_of_megatron():
    offenders = [
        place(path, node)
        for path, tree in parsed(f"{PACKAGE}/diffusion")
        for node in ast.walk(tree)
        if "parallel_state" in (getattr(node, "id", ""), getattr(node, "attr", ""))
    ]
    assert_none("diffusion takes groups as arguments, not from parallel_state", offenders)


def test_files_are_short():
    offenders = []
    for path, _ in house():
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_FILE:
            offenders.append(f"{place(path)} has {lines} lines")
    assert_none(f"a file has at most {MAX_FILE} lines", offenders)


def test_functions_are_short():
    offenders = [
        f"{place(path, function)} {function.name} has {length(function)} lines"
        for path, tree in house()
        for function in functions(tree)
        if length(function) > MAX_FUNCTION
    ]
    assert_none(f"a function has at most {MAX_FUNCTION} lines", offenders)


def test_functions_are_flat():
    offenders = [
        f"{place(path, function)} {function.name} nests {nesting(function)} deep"
        for path, tree in house()
        for function in functions(tree)
        if nesting(function) > MAX_NESTING
    ]
    assert_none(f"blocks nest at most {MAX_NESTING} deep", offenders)


def test_public_functions_say_what_they_do():
    offenders = [
        f"{place(path, function)} {function.name}"
        for path, tree in house()
        for function in functions(tree)
        if not function.name.startswith("_")
        and length(function) > UNDOCUMENTED
        and not ast.get_docstring(function)
    ]
    assert_none(f"a public function over {UNDOCUMENTED} lines has a docstring", offenders)


def test_every_module_says_what_it_is():
    offenders = [place(path) for path, tree in house() if not ast.get_docstring(tree)]
    assert_none("a module has a docstring", offenders)


def test_sources_are_ascii():
    offenders = []
    for path in tracked():
        if path.suffix not in SOURCES and path.name != "Makefile":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.isascii():
                offenders.append(f"{place(path)}:{number}")
    assert_none("sources are ASCII; write \\u escapes", offenders)


def test_no_file_names_a_machine():
    offenders = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content or path.suffix == ".svg":
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            if found := MACHINE.search(line):
                offenders.append(f"{place(path)}:{number} has {found.group()}")
    assert_none("no machine's paths and no registry's hosts in the project", offenders)


def test_constraints_are_names_and_versions_of_all_that_is_required():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)]
    assert_none("constraints.txt holds name==version lines", wrong)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["dev"], *extras["data"], *extras["gym"]]
    names = {re.split(r"[^a-z0-9-]", requirement)[0] for requirement in required}
    names.remove(project["name"])  # dev takes the extras that it tests
    assert {"torch", "pytest"} <= names
    assert_none("constraints.txt pins what pyproject.toml requires", sorted(names - pinned))
    assert "apex" not in pinned, "the registry's apex is another project"


def test_no_lock_file_is_tracked():
    locks = [place(p) for p in tracked() if p.name in ("uv.lock", "poetry.lock")]
    assert_none("a lock file spells out addresses; pin in constraints.txt", locks)
