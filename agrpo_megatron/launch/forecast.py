"""What a run will take, as lines of text: seconds, GPU-hours, disk and memory."""

from agrpo_megatron.config.settings import LaunchSettings, Settings
from agrpo_megatron.hardware.machine import one_line
from agrpo_megatron.launch.speed import Speed
from agrpo_megatron.reports.text import compact, duration, flop
from agrpo_megatron.runs.sizes import Sizes
from agrpo_megatron.scaling.forecast.disk import disk, evaluations_of, parameters, size
from agrpo_megatron.scaling.memory import PARTS, Memory

GIB, MIB = 2**30, 2**20


def forecast(settings: Settings, sizes: Sizes, speed: Speed, *, world_size: int) -> list[str]:
    """Return lines on time, disk and model of complete settings, with what they assume."""
    from agrpo_megatron.scaling.forecast.work import count_flops, may_fail  # loads torch

    settings = sizes.with_iterations(settings)
    try:
        flops = count_flops(settings, sizes.train, sizes.held_out, sizes.rows)
    except Exception as error:
        if not may_fail(settings, error):
            raise
        return [f"forecast  not possible: {one_line(error)}"]
    found = sizes.texts
    tokens = 0 if found is None else found.tokens
    stored = disk(settings, rollout_bytes=flops.rollout_bytes, text_tokens=tokens)
    whole, trained = parameters(settings)
    algorithm, training = settings.algorithm, settings.train.iterations
    rollout, update, held_out, supervised = (
        flops / world_size / rate
        for flops, rate in (
            (flops.rollout, speed.rollout),
            (flops.update, speed.update),
            (flops.evaluation, speed.rollout),
            (settings.sft.iterations * flops.sft, speed.update),
        )
    )
    count = evaluations_of(settings)
    total = training * (rollout + update) + count * held_out + supervised
    completions = algorithm.prompts_per_iteration * algorithm.group_size
    hours = f"{world_size * total / 3600:.3g} "
    hours += "rank-hours" if settings.precision == "fp32" else "GPU-hours"
    of_texts = []
    if found is not None:
        made = compact(settings.sft.iterations)
        of_texts = [f"texts     about {compact(tokens)} tokens; {made} supervised iterations"]
    return [
        f"assumed   {speed.text}; all steps run, rewards and saves take nothing",
        f"model     {compact(whole)} parameters, {compact(trained)} trained",
        *of_texts,
        f"iteration {duration(rollout + update)}: rollout {duration(rollout)} "
        f"({flop(flops.rollout)}), update {duration(update)} ({flop(flops.update)}); "
        f"{completions} completions, {flops.scored_rows} scored states",
        f"run       {duration(total)}, {hours}: {training} iterations, {count} evaluations of "
        f"{duration(held_out)}" + (f", supervised {duration(supervised)}" if supervised else ""),
        f"disk      {size(stored.total)}: {stored.checkpoints} checkpoints of "
        f"{size(stored.checkpoint)}, rollouts {size(stored.rollouts)}, samples "
        f"{size(stored.samples)}" + (f", texts {size(stored.texts)}" if stored.texts else ""),
    ]


def memory_text(memory: Memory, launch: LaunchSettings) -> str:
    """Return the memory of the fullest rank, with its parts."""
    unit, name = (GIB, "GiB") if memory.total >= GIB else (MIB, "MiB")
    parts = [(part.replace("_", " "), getattr(memory, part) / unit) for part in PARTS]
    detail = ", ".join(f"{part} {bytes_:.1f}" for part, bytes_ in parts if bytes_)
    total = f"{memory.total / unit:.1f} {name} in the fullest rank"
    if launch.gpus_per_node:
        share = memory.total / launch.gpu_memory / GIB
        total += f", {100 * share:.0f} % of {launch.gpu_memory:g} GiB"
    if memory.host:
        detail += f"; {memory.host / unit:.1f} {name} of the host for each rank"
    return f"{total}: {detail}"
