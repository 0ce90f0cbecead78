"""One optimizer step through Megatron's schedule.

How a loss is scaled. Each micro-batch's loss function returns a SUM over the scored tokens that
the rank holds; the weight of every token includes its row's weight. From there:

- micro-batches: `calculate_per_token_loss` keeps Megatron from averaging, so gradients add up;
- pipeline: only the last stage has a loss; stages before it receive its gradient, unscaled;
- tensor: the ranks of a group compute the same loss of the same tokens, from shards of the logits,
  and Megatron's layers sum the gradients of shared tensors (with sequence parallelism also of
  the norms); so the loss counts once for any group size;
- context: the ranks hold different scored tokens of the same rows, so their losses add up, as over
  data ranks. Megatron sums gradients over context and data together, also without averaging
  because of `calculate_per_token_loss`;
- data: micro-batches of different rows, also summed.

After the last micro-batch Megatron divides once by the integer that the micro-batches reported,
summed over micro-batches, context and data ranks. That integer is the number of rollouts (or SFT
examples) of the whole step, including skipped rollouts without a gradient; one rank reports it
once, and all others report 0. So the gradient is the mean over rollouts under any layout. The
distributed optimizer computes the same sum with a reduce-scatter.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from agrpo_megatron.config.parallel import attention_cost
from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.diffusion.packing import assign_rows
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.layers.context import for_schedule
from agrpo_megatron.megatron.parallel import Ranks, from_last_stage, gather_objects
from agrpo_megatron.training.nonfinite import (
    Loss,
    Metrics,
    NotFinite,
    find_in_gradient,
    find_in_loss,
)
from agrpo_megatron.types import PackedRows, SftBatch, TimestepBatch


def optimizer_step[Batch: (SftBatch, TimestepBatch)](
    engine: Engine, batches: Sequence[Batch], *, loss: Loss[Batch], examples: int
) -> dict[str, float]:
    """Run forward and backward over all micro-batches and update the weights; all ranks.

    Args:
        batches: this data-parallel rank's micro-batches, equally many on every rank (see
            `my_micro_batches`), each cut by `local_part` to the scored tokens of its
            context-parallel rank.
        loss: (logits shard [S, V / tensor parallel], batch) -> loss summed over rows, metrics,
            of the scored tokens that the rank holds. Metrics combine as `LossOutputs` has it; one
            named `loss` is reported in place of the loss, which then only has its gradient.
        examples: rollouts or examples of all ranks, the normaliser.

    Returns:
        The metrics, `loss` (mean over examples), `grad_norm` and `learning_rate`.

    Raises:
        NotFinite: the loss or the gradient is not finite; no weights were changed.
    """
    computed = _forward_and_backward(engine, batches, loss=loss, examples=examples)
    metrics = _combined(computed, engine.ranks, examples=examples)
    loss_is_finite = all(math.isfinite(value) for value in metrics.values())
    facts = [loss_is_finite, _gradient_is_finite(engine)]
    loss_is_finite, gradient_is_finite = _on_all_ranks(facts, engine.ranks)
    if not loss_is_finite:
        finding = find_in_loss(engine, batches, computed, loss=loss)
        raise NotFinite("the loss is not finite", finding)
    if not gradient_is_finite:
        raise NotFinite("the gradient is not finite", find_in_gradient(engine, batches))
    engine.scheduler.step(increment=1)
    _, grad_norm, _ = engine.optimizer.step()  # type: ignore[misc]
    learning_rate = max(group["lr"] for group in engine.optimizer.param_groups)
    return {**metrics, "grad_norm": float(grad_norm or 0.0), "learning_rate": learning_rate}


def accumulate_gradients[Batch: (SftBatch, TimestepBatch)](
    engine: Engine, batches: Sequence[Batch], *, loss: Loss[Batch], examples: int
) -> dict[str, float]:
    """Run only forward and backward; the mean gradient is in `main_grad`; all ranks."""
    computed = _forward_and_backward(engine, batches, loss=loss, examples=examples)
    return _combined(computed, engine.ranks, examples=examples)


def drop_gradients(engine: Engine) -> None:
    """Set all gradients to zero; the weights do not change."""
    for ddp in engine.ddp:
        ddp.zero_grad_buffer()
    engine.optimizer.zero_grad()


@contextmanager
def without_trace(engine: Engine) -> Iterator[None]:
    """Let the body compute gradients that no update takes: at its end, nothing is left of them.

    Gradients are zero, and the states of random numbers (dropout) are those from before.
    """
    tracker: Any = get_cuda_rng_tracker()
    states, device = tracker.get_states(), engine.ranks.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            drop_gradients(engine)
            tracker.set_states(states)


def _forward_and_backward[Batch: (SftBatch, TimestepBatch)](
    engine: Engine, batches: Sequence[Batch], *, loss: Loss[Batch], examples: int
) -> list[Metrics]:
    """Return the loss and the metrics of each micro-batch, if this rank has them."""
    network, ranks = engine.network, engine.ranks
    network.set_training("train")
    network.for_updates()
    drop_gradients(engine)
    reported = examples if ranks.data_context.rank == 0 else 0
    counts = iter([reported] + [0] * (len(batches) - 1))

    padded, tokens = for_schedule([batch.rows for batch in batches], ranks)
    items = list(zip(padded, batches, strict=True))

    def forward_step(iterator: Iterator[tuple[PackedRows, Batch]], model: torch.nn.Module):
        """Run one micro-batch and return its loss function to the schedule."""
        rows, batch = next(iterator)

        def reduce_loss(logits: Tensor):
            total, metrics = loss(logits, batch)
            count = torch.tensor(next(counts), dtype=torch.int, device=total.device)
            return total, count, {"loss": total.detach(), **metrics}

        return model(rows), reduce_loss

    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(items) for _ in engine.ddp],
        model=list(engine.ddp),
        num_microbatches=len(batches),
        seq_length=tokens,
        micro_batch_size=1,
        forward_only=False,
    )
    network.set_training("eval")
    return collected


def my_micro_batches(
    lengths: Tensor, model: ModelSettings, ranks: Ranks, *, budget: int
) -> list[Tensor]:
    """Share rows of these lengths [N] among the data-parallel ranks; returns this rank's part.

    Every rank computes the same plan: equal FLOPs, equal numbers of micro-batches.
    """
    plan = assign_rows(
        lengths,
        budget=budget,
        ranks=ranks.data.size,
        attention=attention_cost(model),
        multiple=ranks.parallel.pipeline if ranks.parallel.virtual > 1 else 1,
    )
    return plan[ranks.data.rank]


def _gradient_is_finite(engine: Engine) -> bool:
    """Return whether this rank's gradient is finite, by a cheap test of its sum."""
    ddps: list[Any] = engine.ddp
    buffers = [b for ddp in ddps for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    total = sum(buffer.grad_data.sum(dtype=torch.float32) for buffer in buffers)
    return bool(torch.as_tensor(total).isfinite())


def _on_all_ranks(facts: list[bool], ranks: Ranks) -> list[bool]:
    """Return for each fact whether it holds on every rank."""
    held = torch.tensor(facts, dtype=torch.int, device=ranks.device)
    dist.all_reduce(held, op=dist.ReduceOp.MIN)
    return held.bool().tolist()


def _combined(computed: list[Metrics], ranks: Ranks, *, examples: int) -> dict[str, float]:
    """Return the metrics of all micro-batches and ranks, on every rank."""
    mine = _reduced(computed, ranks, examples=examples) if computed else {}
    return from_last_stage(mine, ranks)


def _reduced(computed: list[Metrics], ranks: Ranks, *, examples: int) -> dict[str, float]:
    """Combine micro-batches and ranks: sums, maxima or percentiles by name; the last stage."""
    group = ranks.data_context.group
    names = [name for name in computed[0] if "_p99" not in name]
    values = torch.tensor(
        [[float(m[name]) for name in names] for m in computed], device=ranks.device
    )
    sums, tops = values.double().sum(0), values.amax(0)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=group)
    metrics = {n: float(tops[i] if "_max" in n else sums[i]) for i, n in enumerate(names)}
    for name in computed[0].keys() - names:
        mine = torch.cat([metric[name].float() for metric in computed]).cpu()
        metrics[name] = _percentile_99(torch.cat(gather_objects(mine, group)))
    return {**metrics, "loss": metrics["loss"] / examples}


def _percentile_99(values: Tensor) -> float:
    """Return the least value that 99 % of the values do not exceed; 0 for none.

    Negative values are left out. The result is one of the values: the same under every layout.
    """
    kept = values[values >= 0]
    return float(kept.kthvalue(-(-99 * len(kept) // 100)).values) if len(kept) else 0.0
