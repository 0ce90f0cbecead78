"""FLOPs of completions and updates, counted from what ran; 2 per multiply-add.

Matrices, attention, head and low-rank adapters are counted; of experts, those that a token is
routed to, and the router.

In the last layer, keys and values of all tokens are counted, and of all else only scored tokens, as
only these run. Where more runs, it is not counted: with CUDA graphs or sequence parallelism all
does; on a GPU and in rows with patterns all tokens are queries.

Norms, rotations, activations, sampling, the padding of the vocabulary, the merging of adapters into
weights and activations that are recomputed are not, so the count is the same under every layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from agrpo_megatron.config.parallel import layer_matrices
from agrpo_megatron.config.settings import LoraSettings, ModelSettings, Settings
from agrpo_megatron.families.lora import Linear, adapted_layers
from agrpo_megatron.scaling.adapters import layer_number

if TYPE_CHECKING:
    from torch import Tensor

    from agrpo_megatron.types import Row, Trajectory


@dataclass(frozen=True)
class Work:
    """What passes through a model."""

    tokens: int  # through the layers
    pairs: int  # of tokens that see each other
    scored: int = 0  # tokens that reach the head
    last_pairs: int = 0  # of a token that is a query of the last layer, and one that it sees
    last_queries: int = 0  # of the last layer


@dataclass(frozen=True)
class Cost:
    """FLOPs of a unit of each kind of work."""

    token: int
    pair: int
    scored: int
    last_pair: int = 0
    last_query: int = 0

    def of(self, work: Work) -> int:
        """Return the FLOPs of some work."""
        return sum(a * b for a, b in zip(astuple(self), astuple(work), strict=True))


def forward_cost(model: ModelSettings, lora: LoraSettings | None = None) -> Cost:
    """Return the cost of a forward pass; with `lora`, adapters are products of their own."""
    return _sum((1, _weights(model, lora)), (1, _attention(model)), (1, _adapters(model, lora)))


def update_cost(model: ModelSettings, lora: LoraSettings | None = None) -> Cost:
    """Return the cost of a forward and a backward pass.

    Attention and trained weights cost three forwards: outputs, and the gradients of inputs and
    weights. Frozen weights cost two, in the first layer as well: its input takes a gradient, which
    recomputation needs. Megatron computes the gradient of a frozen router, too.
    """
    weights = _weights(model, lora)
    if lora is None or lora.rank is None:
        return _sum((3, weights), (3, _attention(model)))
    routers = sum(layer_matrices(model, number).router for number in range(model.num_layers))
    others = Cost(2 * routers, 0, _head(model) if lora.train_head else 0)
    trained = _adapters(model, lora)
    return _sum((2, weights), (1, others), (3, _attention(model)), (3, trained))


def update_factor(model: ModelSettings, lora: LoraSettings) -> float:
    """Return what a token costs in an update, in forward passes; 3 without adapters.

    Attention and head are left out.
    """
    return update_cost(model, lora).token / forward_cost(model, lora).token


def _weights(model: ModelSettings, lora: LoraSettings | None) -> Cost:
    used = sum(layer_matrices(model, number).used for number in range(model.num_layers))
    # Of the last layer, the output product and the SwiGLU, and the queries if they are split off.
    end = model.query_width + 3 * model.ffn_hidden_size
    end *= model.hidden_size * model.ends_at_scored
    queries = model.query_width * model.hidden_size * _splits_queries(model, lora)
    return Cost(2 * (used - end - queries), 0, _head(model) + 2 * end, 0, 2 * queries)


def _splits_queries(model: ModelSettings, lora: LoraSettings | None) -> bool:
    """Whether the last layer may have a product for queries alone: not with adapters."""
    return model.ends_at_scored and not any(
        layer.mapping.module == "linear_qkv" and layer_number(layer) == model.num_layers - 1
        for layer in _adapted(model, lora)
    )


def _head(model: ModelSettings) -> int:
    assert model.vocab_size is not None
    return 2 * model.hidden_size * model.vocab_size


def _attention(model: ModelSettings) -> Cost:
    """Return the cost of scores and of the weighted values."""
    layer, last = 4 * model.query_width, int(model.ends_at_scored)
    return Cost(0, layer * (model.num_layers - last), 0, layer * last)


def _adapters(model: ModelSettings, lora: LoraSettings | None) -> Cost:
    """Return the cost of adapters; if some experts have none, all are assumed to be as popular."""
    if lora is None or lora.rank is None:
        return Cost(0, 0, 0)
    last = model.num_layers - 1 if model.ends_at_scored else None
    token = scored = routed = 0
    for layer in _adapted(model, lora):
        flops = 2 * lora.rank * (layer.inputs + layer.outputs)
        is_last = layer_number(layer) == last and layer.mapping.module != "linear_qkv"
        if layer.is_head or is_last:
            scored += flops
        elif layer.is_expert:
            routed += flops
        else:
            token += flops
    return Cost(token + routed * model.moe.topk // (model.moe.experts or 1), 0, scored)


def _adapted(model: ModelSettings, lora: LoraSettings | None) -> list[Linear]:
    """Return the published layers that have adapters."""
    return [] if lora is None or lora.rank is None else list(adapted_layers(model, lora))


def _sum(*costs: tuple[int, Cost]) -> Cost:
    """Return the sum of costs, each a number of times."""
    kinds = zip(*([times * n for n in astuple(cost)] for times, cost in costs), strict=True)
    return Cost(*map(sum, kinds))


def completion_flops(trajectory: Trajectory, settings: Settings) -> list[int]:
    """Return the FLOPs [R] of each completion, over all its denoising steps.

    Every denoising step runs the whole row, prompt and completion. A block model's row ends after
    the open block; with a cache, a step runs the open block alone, each finished block runs once
    more, and a prompt runs in the first of its completions. Under a cached policy, the first step
    of a block runs the whole row, and later ones the block. The head runs at the positions that the
    step scored. Rows that only fill up a small head product are not counted.
    """
    lora = settings.lora
    cost = forward_cost(settings.model, None if lora.merge_rollouts else lora)
    return [cost.of(work) for work in completion_work(trajectory, settings)]


def completion_work(trajectory: Trajectory, settings: Settings) -> list[Work]:
    """Return the work [R] of each completion, over all its denoising steps."""
    model, width = settings.model, trajectory.tokens.shape[1]
    heads = scored_positions(trajectory).tolist()
    if model.has_blocks:
        layers = _block_work(trajectory, model, is_cached=settings.rollout.cached is not False)
    elif trajectory.sampling.is_cached:
        layers = _cached_work(trajectory, model)
    else:
        lengths = [len(prompt) + width for prompt in trajectory.prompts]
        rows = zip(lengths, trajectory.num_steps.tolist(), heads, strict=True)
        return [Work(n * steps, n**2 * steps, count, n * count, count) for n, steps, count in rows]
    return [pattern_total(*own, count) for own, count in zip(layers, heads, strict=True)]


def _block_work(
    trajectory: Trajectory, model: ModelSettings, *, is_cached: bool
) -> list[tuple[int, int]]:
    """Return the tokens and pairs [R] of all steps of a block model's completions."""
    from agrpo_megatron.diffusion.blocks import context_row, open_block, state_row
    from agrpo_megatron.diffusion.patterns import visible_pairs

    sampling, result, known = trajectory.sampling, [], set[bytes]()
    begins, ends = _steps_of_blocks(trajectory)
    for prompt, counts in zip(trajectory.prompts, (ends - begins).tolist(), strict=True):
        size, key, tokens, pairs = len(prompt), bytes(prompt.cpu().numpy()), 0, 0
        ran = [(open_block(size, n, sampling), count) for n, count in enumerate(counts) if count]
        for number, ((start, end), count) in enumerate(ran):
            if is_cached:
                count += number < len(ran) - 1  # the finished block runs once more
                tokens += count * (end - start)
                pairs += count * (end - start) * end
            else:
                tokens += count * end
                pairs += count * visible_pairs(state_row(end, size, model, sampling))
        context = ran[0][0][0] if ran else 0
        if is_cached and context and key not in known:
            tokens += context
            pairs += visible_pairs(context_row(context, size, model, sampling))
            known.add(key)
        result.append((tokens, pairs))
    return result


def _cached_work(trajectory: Trajectory, model: ModelSettings) -> list[tuple[int, int]]:
    """Return the tokens and pairs [R] of all steps of a cached policy's completions."""
    from agrpo_megatron.diffusion.blocks import open_part

    sampling, result = trajectory.sampling, []
    begins, ends = _steps_of_blocks(trajectory)
    for prompt, counts in zip(trajectory.prompts, (ends - begins).tolist(), strict=True):
        length, tokens = len(prompt) + sampling.completion_length, 0
        for number, count in enumerate(counts):
            start, end = open_part(len(prompt), number, sampling, shift=model.shift)
            tokens += length * (count > 0) + max(0, count - 1) * (end - start)
        result.append((tokens, tokens * length))
    return result


def scored_work(lengths: Sequence[int], scored: Sequence[int]) -> Work:
    """Return the work of rows that an estimator scores; all tokens of a row see each other.

    Args:
        lengths: tokens of each row, prompt and completion.
        scored: tokens of each row that reach the head.
    """
    last_pairs = sum(n * count for n, count in zip(lengths, scored, strict=True))
    count = sum(scored)
    return Work(sum(lengths), sum(length**2 for length in lengths), count, last_pairs, count)


def pattern_work(patterns: Iterable[Row], scored: int) -> Work:
    """Return the work of rows of patterns; `scored` tokens reach the head.

    A pair of tokens counts where one sees the other.
    """
    from agrpo_megatron.diffusion.patterns import row_length, visible_pairs

    rows = list(patterns)
    return pattern_total(sum(map(row_length, rows)), sum(map(visible_pairs, rows)), scored)


def pattern_total(tokens: int, pairs: int, scored: int) -> Work:
    """Return the work of rows of patterns, whose tokens are all queries of the last layer."""
    return Work(tokens, pairs, scored, pairs, tokens)


def scored_positions(trajectory: Trajectory) -> Tensor:
    """Return how many positions [R] the head scored, over all denoising steps.

    A position is scored in every step of its block up to the step that fixes it; only in that step
    if the sampler chooses positions before the forward. With edits, also in all that follow.
    """
    from agrpo_megatron.diffusion.blocks import block_numbers

    first = last = trajectory.unmask_step
    ran = first < trajectory.num_steps[:, None]
    bounds, blocks = _steps_of_blocks(trajectory), block_numbers(trajectory)[0]
    begins, ends = (bound.gather(1, blocks) for bound in bounds)
    if not trajectory.sampling.foresees_positions:
        first = begins
    if trajectory.sampling.edit_threshold is not None:
        last = ends - 1
    return ((last - first + 1) * ran).sum(1)


def _steps_of_blocks(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Return the first step of each block, and the step after its last, [R, most blocks] each.

    The first step fixes a token, and so do all others but some of those that may edit.
    """
    from agrpo_megatron.diffusion.blocks import block_begins

    begins = block_begins(trajectory)
    ends = begins.roll(-1, dims=1)
    ends[:, -1] = trajectory.num_steps
    return begins, ends
