"""One optimizer step through Megatron's schedule.

How a loss is scaled. Each micro-batch's loss function returns a SUM over its scored tokens; the
weight of every token already holds what belongs to its row. Megatron is told
`calculate_per_token_loss`, so data parallelism sums gradients without averaging, and after the
last micro-batch everything is divided once by the integer that the micro-batches reported,
summed over micro-batches and data-parallel ranks. That integer is the number of rollouts (or of
SFT examples) of the whole step, also of those that were skipped for having no gradient. So the
gradient is the mean over rollouts, whatever the number of micro-batches or ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.types import SftBatch, TimestepBatch

Metrics = dict[str, Tensor]


def optimizer_step[Batch: (SftBatch, TimestepBatch)](
    engine: Engine,
    batches: Sequence[Batch],
    *,
    loss: Callable[[Tensor, Batch], tuple[Tensor, Metrics]],
    examples: int,
) -> dict[str, float]:
    """Run forward and backward over all micro-batches and update the weights; all ranks.

    Args:
        batches: this rank's micro-batches; every rank needs the same number.
        loss: (logits shard [S, V / tensor parallel], batch) -> loss summed over rows, metrics.
            A metric is summed over micro-batches and ranks; one named `*_max*` is maximised.
        examples: rollouts or examples of this data-parallel rank, the normaliser.

    Returns:
        The metrics, `loss` (mean over examples), `grad_norm` and `learning_rate`.

    Raises:
        RuntimeError: the loss or the gradient is not finite.
    """
    metrics = accumulate_gradients(engine, batches, loss=loss, examples=examples)
    if not all(math.isfinite(value) for value in metrics.values()):
        raise RuntimeError(f"the loss is not finite: {metrics}; no weights were changed")
    if not _gradient_is_finite(engine):
        raise RuntimeError("the gradient is not finite; no weights were changed")
    engine.scheduler.step(increment=1)
    _, grad_norm, _ = engine.optimizer.step()  # type: ignore[misc]
    learning_rate = max(group["lr"] for group in engine.optimizer.param_groups)
    return {**metrics, "grad_norm": float(grad_norm or 0.0), "learning_rate": learning_rate}


def accumulate_gradients[Batch: (SftBatch, TimestepBatch)](
    engine: Engine,
    batches: Sequence[Batch],
    *,
    loss: Callable[[Tensor, Batch], tuple[Tensor, Metrics]],
    examples: int,
) -> dict[str, float]:
    """Run forward and backward alone: leaves the mean gradient in `main_grad`; all ranks."""
    engine.network.train()
    engine.ddp.zero_grad_buffer()
    engine.optimizer.zero_grad()
    counts = iter([examples] + [0] * (len(batches) - 1))

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module):
        """Run one micro-batch and hand its loss function back to the schedule."""
        batch = next(iterator)

        def reduce_loss(logits: Tensor):
            total, metrics = loss(logits, batch)
            count = torch.tensor(next(counts), dtype=torch.int, device=total.device)
            return total, count, {**metrics, "loss": total.detach()}

        return model(batch.rows), reduce_loss

    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=engine.ddp,
        num_microbatches=len(batches),
        seq_length=1,  # unused without pipeline stages: rows are packed, lengths vary
        micro_batch_size=1,
        forward_only=False,
    )
    engine.network.eval()
    return _reduce_metrics(collected, examples, engine)


def _gradient_is_finite(engine: Engine) -> bool:
    """Say whether every rank's gradient is finite: a sum of finite numbers tells, cheaply."""
    buffers: Any = (engine.ddp.buffers, engine.ddp.expert_parallel_buffers)  # Megatron's lists
    grads = [buffer.grad_data for group in buffers for buffer in group]
    total = sum(grad.sum(dtype=torch.float32) for grad in grads)
    finite = torch.as_tensor(total, device=engine.ranks.device).isfinite().int()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def equal_count[Batch: (SftBatch, TimestepBatch)](
    batches: Sequence[Batch], engine: Engine, filler: Batch
) -> list[Batch]:
    """Append weightless micro-batches until every data-parallel rank has the same number."""
    most = torch.tensor(max(1, len(batches)), device=engine.ranks.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=engine.ranks.data_group)
    return [*batches, *[filler] * (int(most) - len(batches))]


def _reduce_metrics(collected: list[Metrics], examples: int, engine: Engine) -> dict[str, float]:
    """Combine micro-batches and data-parallel ranks: sums, or maxima where the name says so."""
    group, device = engine.ranks.data_group, engine.ranks.device
    names = list(collected[0])
    values = torch.tensor([[float(m[name]) for name in names] for m in collected], device=device)
    count = torch.tensor([float(examples)], device=device)
    sums = torch.cat([values.sum(0), count]).double()
    tops = values.amax(0)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=group)
    result = {name: float(tops[i] if "_max" in name else sums[i]) for i, name in enumerate(names)}
    result["loss"] /= float(sums[-1])
    return result
