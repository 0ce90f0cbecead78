"""The measurements of `gpu_check.py`, in order; imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One measurement."""

    name: str
    seconds: float  # after which it has failed
    process: str  # jobs of one process share its start
    overrides: tuple[str, ...] = ()  # settings
    kind: str = "model"  # or `ceiling`, or `graphs`
    slower: int = 1  # an update has this many times fewer micro-batches
    fewer: int = 1  # a forward has this many times fewer rows


def _model(spec: str, precision: str, recipe: str | None = None, *more: str) -> tuple[str, ...]:
    chosen = (f"fp8.recipe={recipe}",) if recipe else ()
    return (f"kernels.layer_spec={spec}", f"precision={precision}", *chosen, *more)


BF16 = _model("te", "bf16")
DETERMINISTIC, INVARIANT = "kernels.deterministic=true", "kernels.batch_invariant=true"
# On Hopper, cuDNN's deterministic backward pass reserves memory with the square of a micro-batch's
# tokens: 128 GiB at 8192, 8 GiB at 2048 (hardware/workspace.py). So that job, and the one that it
# is compared with, have 2048.
QUARTER = 4
# The most important first: jobs that the time does not reach are reported as cut. Deterministic
# and batch-invariant kernels are switches of a whole process.
JOBS = (
    Job("ceiling", 40, "bf16", kind="ceiling"),
    Job("te bf16", 60, "bf16", BF16),
    Job("graphs te bf16", 45, "bf16", BF16, kind="graphs"),
    Job("te bf16 2048 tokens", 30, "bf16", BF16, fewer=QUARTER),
    Job("te fp8 blockwise", 60, "fp8", _model("te", "fp8", "blockwise")),
    Job("te fp8 tensorwise", 60, "fp8", _model("te", "fp8", "tensorwise")),
    Job("local bf16", 60, "local", _model("local", "bf16")),
    Job("local fp32", 75, "local", _model("local", "fp32"), slower=8),
    Job("te bf16 deterministic", 60, "deterministic", (*BF16, DETERMINISTIC), fewer=QUARTER),
    Job("te bf16 batch-invariant", 60, "invariant", (*BF16, INVARIANT)),
)


def by_process(jobs: tuple[Job, ...]) -> Iterator[tuple[Job, ...]]:
    """Yield the jobs of each process, in order."""
    for process in dict.fromkeys(job.process for job in jobs):
        yield tuple(job for job in jobs if job.process == process)
