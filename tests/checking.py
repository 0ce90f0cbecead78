"""Run a tool that checks golden numbers on a rank, and read the lines that it prints."""

import contextlib
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parent.parent / "tools"
LINE = re.compile(r"(ok  |FAIL) (.{28}) +([0-9.einf+-]+) \(limit ([0-9.e+-]+)\)  .+")


def run_tool(name, folder, arguments):
    """Run `tools/NAME.py` on this rank; returns its exit status and what it printed.

    Args:
        folder: a directory for what is printed.
    """
    torch.set_num_threads(1)  # the models are tiny, and other tests run at the same time
    printed = Path(folder) / f"printed-{os.environ['RANK']}"
    sys.argv = [str(TOOLS / f"{name}.py"), *map(str, arguments)]
    with (
        printed.open("w") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(sys.argv[0], run_name="__main__")
    return end.value.code, printed.read_text()


def read_checks(printed):
    """Return each check's (word, error), by name, and the closing line."""
    *lines, last = printed.splitlines()
    found = [match for line in lines if (match := LINE.fullmatch(line))]
    assert len(found) == len(lines), printed
    return {m[2].strip(): (m[1].strip(), float(m[3])) for m in found}, last


def whole_name(layout):
    """Return the layout, such as tp2, with every axis named."""
    return "-".join(
        layout if layout[:2] == axis else f"{axis}1" for axis in ("tp", "pp", "cp", "dp")
    )
