"""FLOPs of an iteration, an update, an evaluation and a supervised step, before any of them ran.

Rollouts of all steps go through the same counts as those of a run (`scaling.flops`), and through
the estimator itself, so every estimator, sampler and attention is covered by one arithmetic.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

from agrpo_megatron.config.annealing import Attention, attentions
from agrpo_megatron.config.parallel import attention_cost
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.batches import recorded_logprobs, row_lengths
from agrpo_megatron.diffusion.blocks import doubled_row
from agrpo_megatron.diffusion.packing import assign_rows
from agrpo_megatron.diffusion.patterns import ahead
from agrpo_megatron.diffusion.replays.rows import replayed_rows
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.table import needs_current_pass, needs_old_pass, scored_rows
from agrpo_megatron.scaling.flops import (
    Work,
    completion_flops,
    completion_work,
    forward_cost,
    pattern_work,
    scored_work,
    update_cost,
)
from agrpo_megatron.scaling.forecast.rollouts import whole_rollout
from agrpo_megatron.trajectories import tensors
from agrpo_megatron.types import Rollout, ScoredRows

AUTO_DRAWS = 8  # with which `algorithm.mc_samples=auto` begins, as null of agrpo
SOME = 32  # completions that are laid out; they stand for all
LARGEST_GROUP = 256  # completions of a group that are laid out
SOME_ROWS = 1024  # packed rows that are put into micro-batches
SOME_SHARES = 8  # of tokens ahead that stand for annealing
SOME_UPDATES = 8  # that are counted; further ones score as many states as the last of them


@dataclass(frozen=True)
class Flops:
    """FLOPs of all ranks together, if every step runs and every completion has an advantage."""

    rollout: int  # of an iteration; 0 if stored rollouts are replayed
    update: int  # all updates of an iteration
    evaluation: int  # one evaluation during training
    sft: int  # an iteration of the supervised phase
    scored_rows: int  # states that the updates of an iteration score
    rollout_bytes: int  # stored rollouts of an iteration
    rollout_work: Work  # tokens, pairs and scored tokens behind `rollout`, sampled or replayed
    update_work: Work  # of the passes with gradient behind `update`
    update_rows: int  # packed rows of these passes
    update_batches: int  # micro-batches of these passes, of all replicas together
    update_extra: int  # FLOPs of the passes without gradient, part of `update`


def may_fail(settings: Settings, error: Exception) -> bool:
    """Return whether an error of `count_flops` must not stop what only shows its numbers.

    The user's own estimator has not seen a rollout yet, and the counted ones may not fit in memory.
    """
    return settings.algorithm.is_own_code or isinstance(error, MemoryError | RuntimeError)


def count_flops(
    settings: Settings,
    train: Sequence[int],
    held_out: Sequence[int],
    supervised: Sequence[tuple[int, int]] = (),
) -> Flops:
    """Count the FLOPs of complete settings.

    Args:
        train: lengths of prompts of training problems, in tokens; at least one.
        held_out: lengths of the prompts of an evaluation; none: it takes nothing.
        supervised: lengths of prompt and response of some rows of `sft.data`; without, the
            phase learns from solutions.
    """
    if settings.algorithm.mc_samples == "auto":
        algorithm = replace(settings.algorithm, mc_samples=AUTO_DRAWS)
        settings = replace(settings, algorithm=algorithm)
    algorithm, model = settings.algorithm, settings.model
    size = min(algorithm.group_size, LARGEST_GROUP)
    groups = min(max(1, SOME // size), algorithm.prompts_per_iteration)
    train = evenly(train, groups)
    share = algorithm.prompts_per_iteration * algorithm.group_size / (len(train) * size)
    rollout = whole_rollout(train, model, settings.sampling, group_size=size)
    update = _update(settings, rollout, share)
    sampled = sum(completion_flops(rollout.trajectory, settings))
    stored = sum(tensor.nbytes for tensor in tensors(rollout.trajectory).values())
    return Flops(
        rollout=0 if settings.train.from_rollouts else round(share * sampled),
        update=round(share * (update.flops + update.extra)),
        evaluation=_evaluation(settings, held_out),
        sft=_supervised(settings, train, supervised),
        scored_rows=round(share * update.states),
        rollout_bytes=round(share * stored),
        rollout_work=_scaled(completion_work(rollout.trajectory, settings), share),
        update_work=_scaled([update.work], share),
        update_rows=round(share * update.rows),
        update_batches=update.batches,
        update_extra=round(share * update.extra),
    )


@dataclass(frozen=True)
class _Passes:
    """The passes of updates over the rollouts that are laid out."""

    states: int  # scored
    work: Work  # with gradient
    rows: int  # packed
    batches: int  # micro-batches of all rollouts, laid out or not
    flops: int  # with gradient
    extra: int  # FLOPs without gradient

    def plus(self, other: "_Passes", *, times: int = 1) -> "_Passes":
        """Return these passes and another one's, so many times."""
        names = ("states", "rows", "batches", "flops", "extra")
        sums = {name: getattr(self, name) + times * getattr(other, name) for name in names}
        return _Passes(work=_scaled([self.work, _scaled([other.work], times)], 1), **sums)


def _scaled(parts: Sequence[Work], share: float) -> Work:
    """Return the sum of some work, multiplied by a share."""
    sums = (sum(kind) for kind in zip(*map(astuple, parts), strict=True))
    return Work(*(round(share * count) for count in sums))


def evenly(values: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of some values, evenly spread over their sorted order."""
    return spread(values, min(count, len(values)))


def spread(values: Sequence[int], count: int) -> list[int]:
    """Return `count` of some values, evenly spread over their sorted order; some may repeat."""
    values = sorted(values)
    return [values[(2 * number + 1) * len(values) // (2 * count)] for number in range(count)]


def _update(settings: Settings, rollout: Rollout, share: float) -> _Passes:
    """Return the passes of all updates on rollouts.

    Args:
        share: all rollouts of an iteration over those that are laid out.
    """
    algorithm, model = settings.algorithm, settings.model
    updates, total = algorithm.updates_per_iteration, _Passes(0, Work(0, 0, 0), 0, 0, 0, 0)
    counted = min(updates, SOME_UPDATES)
    for number in range(counted):
        context = DrawContext(algorithm, eos_id=model.eos_token_id, seed=number)
        rows = scored_rows(rollout, context)
        passes = _passes(settings, rollout, rows, share=share, is_first=number == 0)
        # Further updates score as many states as the last one that is counted.
        total = total.plus(passes, times=1 if number < counted - 1 else 1 + updates - counted)
    return total


def _passes(
    settings: Settings, rollout: Rollout, rows: ScoredRows, *, share: float, is_first: bool
) -> _Passes:
    """Return the passes of an update: with gradient, and without."""
    algorithm, model, lora = settings.algorithm, settings.model, settings.lora
    scored = rows.scored.sum(1).tolist()
    replayed = replayed_rows(rows, rollout, model, budget=settings.train.token_budget)
    if replayed is None:
        lengths = row_lengths(rollout, rows).tolist()
        work = scored_work(lengths, scored)
    else:
        work = pattern_work([row.pattern for row in replayed], sum(scored))
        lengths = [row.length for row in replayed]
    is_recorded = recorded_logprobs(rollout, rows) is not None
    own = needs_old_pass(rows, algorithm, is_recorded=is_recorded, is_first=is_first)
    own += needs_current_pass(rows, algorithm, is_first=is_first)
    frozen = forward_cost(model).of(work) if algorithm.needs_reference else 0
    return _Passes(
        states=len(rows.rollout),
        work=work,
        rows=len(lengths),
        batches=_micro_batches(lengths, settings, share),
        flops=update_cost(model, lora).of(work),
        extra=own * forward_cost(model, lora).of(work) + frozen,
    )


def _micro_batches(lengths: Sequence[int], settings: Settings, share: float) -> int:
    """Return the micro-batches of an update on one rank.

    Args:
        lengths: tokens of the packed rows that are laid out.
        share: all packed rows over these.
    """
    attention, budget = attention_cost(settings.model), settings.train.token_budget
    rows = max(1, round(share * len(lengths)))
    count = min(rows, SOME_ROWS)
    some = torch.tensor([lengths[number * len(lengths) // count] for number in range(count)])
    (found,) = assign_rows(some, budget=budget, ranks=1, attention=attention)
    return -(-len(found) * rows // count)


def _evaluation(settings: Settings, held_out: Sequence[int]) -> int:
    """Return the FLOPs of one greedy completion of each prompt."""
    if not held_out:
        return 0
    some = evenly(held_out, SOME)
    rollout = whole_rollout(some, settings.model, settings.evaluation_sampling, group_size=1)
    flops = sum(completion_flops(rollout.trajectory, settings))
    return round(flops * len(held_out) / len(some))


def _supervised(settings: Settings, prompts: Sequence[int], rows: Sequence[tuple[int, int]]) -> int:
    """Return the FLOPs of a supervised step, the mean over the schedule of attention.

    Half of a response is masked, on average. Both texts of a pair pass under each mask: with
    gradient, and twice without.
    """
    sft, model, lora = settings.sft, settings.model, settings.lora
    if not sft.iterations:
        return 0
    rows = rows or [(size, settings.sampling.completion_length) for size in prompts]
    held = attentions(settings, most=SOME_SHARES)
    works = [(_rows_work(rows, sees, settings), count) for sees, count in held]
    cost = sum(update_cost(model, lora).of(work) * count for work, count in works)
    if sft.loss == "vrpo":
        frozen = forward_cost(model, lora), forward_cost(model)
        cost += sum(pass_.of(work) * count for pass_ in frozen for work, count in works)
        cost *= 2 * sft.preferences.masks
    return round(cost * sft.batch_size / len(rows) / sum(count for _, count in works))


def _rows_work(rows: Sequence[tuple[int, int]], sees: Attention, settings: Settings) -> Work:
    """Return the work of supervised rows under some attention."""
    model, widths = sees.model, [width for _, width in rows]
    scored = [width // 2 for width in widths]
    if settings.sft.autoregressive_weight:
        scored = [half + width for half, width in zip(scored, widths, strict=True)]
    wholes = [prompt + width for prompt, width in rows]
    if sees.ahead is not None:
        return pattern_work([ahead(whole, sees.ahead) for whole in wholes], sum(scored))
    if not model.has_blocks:
        return scored_work(wholes, scored)
    pairs = zip(rows, wholes, strict=True)
    copied = [doubled_row(prompt, whole, model, sees.sampling) for (prompt, _), whole in pairs]
    return pattern_work(copied, sum(scored))
