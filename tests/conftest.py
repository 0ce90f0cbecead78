"""What every test shares; ranks are started by `tests.ranks`.

Tests run with one thread, since several test processes and several ranks share the cores.
Hypothesis draws the same examples every time, and no deadline fails a busy machine.
"""

import os

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

NEEDS_GPU = "needs a GPU: tools/gpu_check.sh runs it on one"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that test processes end together.

    Skip what needs a GPU where there is none, unless it is to be rehearsed on the CPU.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing or os.environ.get("AGRPO_REHEARSE_GPU") == "1":
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what a machine without a GPU did not test, and how it is tested."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NEEDS_GPU in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(
            f"{count} tests need a GPU and were skipped: tools/gpu_check.sh runs them where there "
            "is one; AGRPO_REHEARSE_GPU=1 pytest tests/gpu runs them on the CPU, tiny and with "
            "stand-ins for kernels. -rs lists them."
        )
