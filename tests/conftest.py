"""What every test shares; ranks are started by `tests.ranks`.

Tests run with one thread, since several test processes and several ranks share the cores.
Hypothesis draws the same examples every time, and no deadline fails a busy machine.
"""

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

NEEDS_GPU = "needs a GPU: tools/gpu_check.sh runs it on one"
HERE = Path(__file__).parent
# What takes long, the longest first (by `--durations=0`), so that test processes end together.
# Tests that mostly wait, for SLURM, for a hung rank or for a limit of time, are spread among the
# others: together at the beginning they would leave the cores idle.
WAITING = (
    "slurm/test_disturbed.py",
    "slurm/test_out_of_time.py",
    "slurm/test_jobs.py",
    "resilience/test_nvrx.py",
    "resilience/test_watchdog.py",
    "slurm/test_continued.py",
    "slurm/test_lost_nodes.py",
    "resilience/test_failure.py",
    "launch/test_sweep_jobs.py",
)
LONGEST = (
    "test_te.py",
    "test_gpus_check.py",
    "training/test_layouts.py",
    "training/test_estimators.py",
    "training/test_expert_layouts.py",
    "test_conformance.py",
    "resilience/test_stop.py",
    "training/test_nan_guard.py",
    "megatron/test_pipeline.py",
    "test_compare_estimators.py",
    "training/variance/test_auto.py",
    "test_gpu_check.py",
    "cli/test_alone.py",
    "training/test_flops.py",
    "training/supervised/test_from_autoregressive.py",
    "rollout/test_cached.py",
    "training/test_rollout_experts.py",
    "training/test_resume.py",
    "megatron/test_one_queue.py",
    "cli/test_run.py",
    "test_examples.py",
    "test_tutorial.py",
    "tasks/test_golden.py",
    "diffusion/test_fused_draw.py",
    "training/test_devices.py",
    "training/test_async.py",
    "test_notebook.py",
    "checkpoint/exports/test_tools.py",
    "evaluation/test_evaluate.py",
    "runs/test_log.py",
    "cli/test_convert.py",
    "checkpoint/exports/test_own_files.py",
    "cli/test_evaluate.py",
    "serving/test_lm_eval.py",
    "tasks/test_hostile.py",
    "serving/test_server.py",
    "training/test_checkpointing.py",
    "resilience/test_attempts.py",
    "test_check_estimators.py",
)
SPREAD = 2  # files of the others between two that wait
# Their tests share nothing that is slow to make: each goes to the next free test process.
APART = {
    "resilience/test_failure.py",
    "resilience/test_nvrx.py",
    "resilience/test_watchdog.py",
    "training/test_checkpointing.py",
    "training/test_nan_guard.py",
    "tasks/test_golden.py",
    "test_conformance.py",
    "test_gpu_check.py",
}


@pytest.hookimpl(optionalhook=True)  # tests of GPUs run without xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each test process a file at a time, and single tests of files in `APART`."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.removeprefix("tests/") in APART else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, and spread those that wait.

    Skip what needs a GPU where there is none, unless it is to be rehearsed on the CPU.
    """
    place = {HERE / name: (SPREAD + 1) * number for number, name in enumerate(WAITING)}
    others = [HERE / name for name in LONGEST]
    others += dict.fromkeys(item.path for item in items if item.path not in {*place, *others})
    for number, path in enumerate(others):
        place[path] = number + number // SPREAD + 1
    items.sort(key=lambda item: place[item.path])
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
