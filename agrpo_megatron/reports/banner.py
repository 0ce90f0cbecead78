"""The first lines of a run: on what it runs, what it trains, what it takes, where things go."""

from collections.abc import Sequence
from pathlib import Path

from agrpo_megatron.config.parallel import layout_name
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.reports.text import compact, counted, flop
from agrpo_megatron.runs.log import METRICS, SAMPLES
from agrpo_megatron.runs.progress import CHECKPOINTS, PHASES, Progress
from agrpo_megatron.runs.sizes import Sizes
from agrpo_megatron.scaling.forecast.disk import evaluations_of, parameters


def banner(
    settings: Settings,
    sizes: Sizes,
    *,
    device: str,
    world_size: int,
    phases: Sequence[str],
    done: Progress | None = None,
) -> list[str]:
    """Return at most eight lines on a run that is about to start or resume.

    Args:
        device: of each rank, for instance "NVIDIA H200" or "CPU, 2 threads".
        done: of the checkpoint that the run resumes from; None: it starts.
    """
    whole, trained = parameters(settings)
    layout = layout_name(settings.parallel, world_size)
    ranks = counted(world_size, "rank")
    adapters = f" in adapters of rank {settings.lora.rank}" * (settings.lora.rank is not None)
    logging, directory = settings.logging, Path(settings.run.dir)
    lines = [
        f"device    {ranks} on {device}; layout {layout}, {settings.precision}",
        f"model     {settings.model.family}, {compact(whole)} parameters, "
        f"{compact(trained)} trained{adapters}",
        f"plan      {_plan(settings, sizes, phases)}",
        *(_iteration(settings, sizes) if "rl" in phases and settings.train.iterations else []),
        f"writes    {directory}: {METRICS}, {SAMPLES}, {CHECKPOINTS}/; wandb {logging.wandb}",
        *_profiled(settings, done),
        "stop      by Ctrl-C; the same command resumes the run",
    ]
    return lines


def _profiled(settings: Settings, done: Progress | None) -> list[str]:
    wanted = settings.profile
    if wanted.start is None:
        return []
    last = wanted.start + wanted.iterations - 1
    window = (
        f"iteration {last}" if wanted.iterations == 1 else f"iterations {wanted.start} to {last}"
    )
    said = f"profile   {wanted.phase} {window}, by {wanted.tool}"
    if done is None:
        return [said]
    if PHASES.index(done.phase) > PHASES.index(wanted.phase) or (
        done.phase == wanted.phase and done.iteration >= last
    ):
        here = f"{done.phase} iteration {done.iteration}"
        return [f"{said}; nothing now, as the run resumes after {here}"]
    is_within = done.phase == wanted.phase and done.iteration >= wanted.start
    return [said + f"; now from iteration {done.iteration + 1} on" * is_within]


def _plan(settings: Settings, sizes: Sizes, phases: Sequence[str]) -> str:
    parts = []
    if "sft" in phases and settings.sft.iterations:
        parts.append(counted(settings.sft.iterations, "supervised iteration"))
    if "rl" in phases:
        count = evaluations_of(settings)
        learned = counted(settings.train.iterations, "iteration")
        parts.append(f"{learned} of reinforcement learning")
        problems = counted(len(sizes.held_out), "problem")
        parts.append(f"{counted(count, 'evaluation')} of {problems}")
    return ", ".join(parts)


def _iteration(settings: Settings, sizes: Sizes) -> list[str]:
    """Return what an iteration draws and computes; no cost where it cannot be counted."""
    from agrpo_megatron.scaling.forecast.work import count_flops, may_fail  # loads torch

    algorithm, sampling = settings.algorithm, settings.sampling
    completions = algorithm.prompts_per_iteration * algorithm.group_size
    lines = [
        f"iteration {algorithm.prompts_per_iteration} prompts x {algorithm.group_size} completions "
        f"of {sampling.completion_length} tokens in {sampling.most_steps} steps: "
        f"{compact(completions * sampling.completion_length)} tokens"
    ]
    try:
        flops = count_flops(settings, sizes.train, sizes.held_out)
    except Exception as error:
        if not may_fail(settings, error):
            raise
        return lines
    return [
        *lines,
        f"cost      {flop(flops.rollout)} of rollouts and {flop(flops.update)} of "
        f"updates an iteration at most, {flops.scored_rows} scored states",
    ]
