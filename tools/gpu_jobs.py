"""The measurements of `gpu_check.py`, in order; imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One measuring process."""

    name: str
    seconds: float  # after which it is cut
    overrides: tuple[str, ...] = ()  # settings
    kind: str = "model"  # or `ceiling`, or `graphs`
    slower: int = 1  # an update has this many times fewer micro-batches


def _model(spec: str, precision: str, recipe: str | None = None, *more: str) -> tuple[str, ...]:
    chosen = (f"fp8.recipe={recipe}",) if recipe else ()
    return (f"kernels.layer_spec={spec}", f"precision={precision}", *chosen, *more)


# The most important first: jobs that the time does not reach are reported as cut.
JOBS = (
    Job("ceiling", 40, kind="ceiling"),
    Job("te bf16", 60, _model("te", "bf16")),
    Job("te fp8 blockwise", 60, _model("te", "fp8", "blockwise")),
    Job("local bf16", 60, _model("local", "bf16")),
    Job("te fp8 tensorwise", 60, _model("te", "fp8", "tensorwise")),
    Job("graphs te bf16", 45, _model("te", "bf16"), kind="graphs"),
    Job("te bf16 deterministic", 60, _model("te", "bf16", None, "kernels.deterministic=true")),
    Job("te bf16 batch-invariant", 60, _model("te", "bf16", None, "kernels.batch_invariant=true")),
    Job("local fp32", 75, _model("local", "fp32"), slower=8),
)
