"""Processes that a test started and that should be gone."""

import subprocess
import time
from pathlib import Path


def assert_gone(folder: Path) -> None:
    """Wait until no process has a folder in its command line; a killed one takes its time."""
    deadline = time.monotonic() + 10
    while left := subprocess.run(["pgrep", "-f", str(folder)], capture_output=True).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
