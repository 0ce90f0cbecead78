"""How the rows of a replica's rollout share forward passes."""

from collections.abc import Sequence
from dataclasses import dataclass

from agrpo_megatron.config.parallel import data_ranks
from agrpo_megatron.config.settings import ParallelSettings, Settings
from agrpo_megatron.scaling.forecast.work import spread
from agrpo_megatron.scaling.memory import row_bytes

SOME = 4096  # rows that are laid out; they stand for all


@dataclass(frozen=True)
class Batches:
    """The forward passes of a replica's rollout, if every denoising step runs."""

    rows: int  # completions of the replica
    largest: int  # rows of a forward pass, at most
    together: float  # rows of a forward pass, on average
    in_flight: int  # forward passes at one time, of a pipeline
    count: int  # forward passes
    waits: float  # passes of a stage that it waits for, over those that it runs


def rollout_batches(
    settings: Settings, prompts: Sequence[int], *, ranks: int, step_tokens: float
) -> Batches:
    """Return the forward passes that the sampler makes, as `diffusion.admission` fills them.

    Rows of a block model begin one step later than the first row of their prompt, and a cached
    policy computes fewer tokens after the first step of a block: there, the count is an estimate.

    Args:
        prompts: tokens of some prompts; they stand for all.
        step_tokens: tokens that a row computes in a denoising step, on average.
    """
    sampling, layout, algorithm = settings.sampling, settings.rollout_layout, settings.algorithm
    replicas, steps = data_ranks(layout, ranks), sampling.most_steps
    rows = -(-algorithm.prompts_per_iteration * algorithm.group_size // replicas)
    groups = settings.rollout.groups or (2 * layout.pipeline if layout.pipeline > 1 else 1)
    longest = max(prompts) + sampling.completion_length
    most, count = settings.rollout.rows or rows, min(rows, SOME)
    longest_first = reversed(spread(prompts, count))
    lengths: list[float] = [size + sampling.completion_length for size in longest_first]
    if settings.caches_keys(sampling):
        slots = int(settings.rollout.cache_memory * 2**30) // row_bytes(settings, layout, longest)
        most = min(most, -(-max(1, min(rows, slots)) // groups))
        each = step_tokens if sampling.is_cached else min(longest, 2 * sampling.block_length)
        lengths = [each] * count
    found = _filled(lengths, budget=settings.train.token_budget, most=most, groups=groups)
    passes = -(-steps * len(found) * rows // count)
    return Batches(
        rows=rows,
        largest=max(found),
        together=rows * steps / passes,
        in_flight=min(groups, len(found)),
        count=passes,
        waits=_waits(settings, layout, fills=len(found), groups=groups, passes=passes),
    )


def _filled(lengths: Sequence[float], *, budget: int, most: int, groups: int) -> list[int]:
    """Return the rows of each forward pass that all rows need for one denoising step.

    The first passes take a fair share for each group; a later one takes the place of a finished
    one, and takes what its budget of tokens holds.

    Args:
        lengths: tokens of each row, longest first.
        most: rows of a forward pass.
    """
    found, start, rest = list[int](), 0, float(sum(lengths))
    while start < len(lengths):
        share, used, end = rest / max(1, groups - len(found)), 0.0, start
        while end < len(lengths) and end - start < most and (used < share or end == start):
            if end > start and used + lengths[end] > budget:
                break
            used, end = used + lengths[end], end + 1
        found.append(end - start)
        start, rest = end, rest - used
    return found


def _waits(
    settings: Settings, layout: ParallelSettings, *, fills: int, groups: int, passes: int
) -> float:
    """Return the passes of a stage that it waits for, over those that it runs.

    A ring fills and drains once a rollout; Megatron's schedule in every denoising step. A ring with
    fewer groups than stages waits for its own draws.

    Args:
        fills: forward passes of one denoising step of all rows.
    """
    stages, is_ring = layout.pipeline, settings.rollout.schedule == "ring"

    def of(together: int) -> float:
        if is_ring:
            return max(1.0, stages / together) - 1
        return (stages - 1) / layout.virtual / together

    whole, left = divmod(fills, groups)
    total = whole * groups * of(groups) + (left * of(left) if left else 0.0)
    filling = (min(stages, left or groups) - 1) / layout.virtual * is_ring
    return total / fills + filling / passes
