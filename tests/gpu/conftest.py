"""Record each GPU test as it ends, for `tools/gpu_check.sh`; continue after a lost GPU.

AGRPO_GPU_RESULTS names a file of JSON lines. Tests that it already lists are left out, so a second
pytest continues after one that was killed.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.gpu.common import REHEARSES, prepare

LOST = 3  # exit status: the GPU's context is lost, and no further test can run in this process
RESULTS = os.environ.get("AGRPO_GPU_RESULTS")


def _record(**line: object) -> None:
    if RESULTS:
        with Path(RESULTS).open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that an earlier pytest started."""
    if not RESULTS:
        return
    path = Path(RESULTS)
    lines = path.read_text().splitlines() if path.exists() else []
    begun = {line["test"] for line in map(json.loads, lines) if line["event"] == "start"}
    left = [item for item in items if item.nodeid not in begun]
    if not begun:
        _record(event="collected", count=len(items))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in begun])
    items[:] = left


def pytest_runtest_logstart(nodeid: str) -> None:
    _record(event="start", test=nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Record the outcome once: of the test, or of a set-up that failed or skipped."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" or (report.when == "setup" and not report.passed):
        reason = ""
        if report.skipped:
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.failed and call.excinfo is not None:
            reason = f"{call.excinfo.typename}: {call.excinfo.value}"[:500]
        _record(
            event="end",
            test=item.nodeid,
            outcome=report.outcome,
            seconds=round(report.duration, 2),
            reason=reason,
            figures=dict(item.user_properties),
        )


@pytest.fixture(autouse=True)
def gpu():
    """Prepare the device; end pytest if the last test lost it."""
    prepare()
    yield
    if REHEARSES:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the GPU's context is lost: {error}", returncode=LOST)
