"""Settings of the profiler."""

from dataclasses import dataclass

from agrpo_megatron.config.schema import setting

TOOLS = ("torch", "nsys")


@dataclass(frozen=True)
class ProfileSettings:
    """A window of iterations whose operators are recorded."""

    start: int | None = setting(
        None, "first iteration to profile, of a run from 1; null: none", low=1
    )
    iterations: int = setting(1, "iterations to profile", low=1)
    phase: str = setting("rl", "phase of the iterations", choices=("sft", "rl"))
    tool: str = setting(
        "torch",
        "torch: a trace for Perfetto and a table of the operators, in RUN/profile; nsys: NVTX "
        "ranges and the start and stop of CUDA's profiler, for `nsys profile -c cudaProfilerApi`",
        choices=TOOLS,
    )
    ranks: list[int] | None = setting(None, "ranks to profile; null: rank 0")
    memory: bool = setting(
        False, "also record allocations; on a GPU a snapshot for pytorch.org/memory_viz"
    )
