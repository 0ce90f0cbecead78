"""List the packages that a GPU check lacks, and how to get each; imports only Python's library.

    python tools/gpu_needs.py NAME WHEELS      of the check NAME, which installs the folder WHEELS
    python tools/gpu_needs.py --te WHEELS      how to get the wheels of Transformer Engine
    python tools/gpu_needs.py --collect WHEELS        what to fetch that WHEELS lacks, as pinned

Exit status 1 if the check cannot run without what is missing. Transformer Engine may be missing.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (3, 12)
# Of the project's dependencies, those that the checks import.
COLLECTED = ("megatron-core", "psutil", "safetensors", "sentencepiece")  # by --collect
NEEDED = ("torch", "numpy", "pyyaml", "pytest", *COLLECTED)
TE = "transformer_engine"
TE_VERSION = "2.20.2"
TE_WHEELS = (
    f"{TE}=={TE_VERSION} {TE}_cu13=={TE_VERSION} nvdlfw_inspect pydantic pydantic_core "
    "annotated_types typing_inspection importlib_metadata"
)


def main() -> int:
    """Print what is missing; returns the exit status."""
    name, wheels = sys.argv[1:]
    if name == "--te":
        print("\n".join(transformer_engine(wheels)))
        return 0
    if name == "--collect":
        there = {path.name.partition("-")[0] for path in Path(wheels).glob("*.whl")}
        lacking = [name for name in COLLECTED if name.replace("-", "_") not in there]
        print("\n".join(map(_pinned, lacking)))
        return 0
    lines = missing(name, wheels)
    if not lines and not _has("transformer-engine"):
        print(f"{name}: without Transformer Engine, rows and tests of te are left out")
        print("\n".join(transformer_engine(wheels)))
    for line in lines:
        print(f"{name}: error: {line}", file=sys.stderr)
    return 1 if lines else 0


def missing(name: str, wheels: str) -> list[str]:
    """Return a line for each thing that the check needs and this Python lacks."""
    if sys.version_info < PYTHON:
        found, wanted = (".".join(map(str, each[:2])) for each in (sys.version_info, PYTHON))
        return [f"{sys.executable} is Python {found}; set PYTHON to Python {wanted} or newer"]
    return [
        f"{package} is not installed; {how_to_get(package, name, wheels)}"
        for package in NEEDED
        if not _has(package)
    ]


def how_to_get(package: str, name: str, wheels: str) -> str:
    """Return the commands that provide a package."""
    install = f"pip install {_pinned(package)}"
    if package not in COLLECTED:
        return install
    collect = f"tools/{name}.sh --collect --wheels {wheels}"
    return f"{install}, or on a machine with network: {collect}, and copy {wheels} to this one"


def transformer_engine(wheels: str) -> list[str]:
    """Return how to get its wheels into a folder."""
    return [
        f"Transformer Engine's wheels belong into {wheels}; with network and the same torch:",
        f"  pip download --no-deps --only-binary=:all: -d {wheels} {TE_WHEELS}",
        f"  pip wheel --no-deps --no-build-isolation -w {wheels} {TE}_torch=={TE_VERSION}",
        "  (the second compiles: docs/install.md, Transformer Engine, says what it needs)",
    ]


def _has(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _pinned(package: str) -> str:
    """Return the package as constraints.txt pins it."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(f"{package}==")), package)


if __name__ == "__main__":
    sys.exit(main())
