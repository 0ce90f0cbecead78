"""An estimate of what autograd keeps for the backward pass."""

from collections import Counter
from collections.abc import Mapping

from agrpo_megatron.config.parallel import layer_matrices, layers_of
from agrpo_megatron.config.settings import (
    LoraSettings,
    ModelSettings,
    ParallelSettings,
    SamplingSettings,
    SftSettings,
)
from agrpo_megatron.scaling.adapters import layer_number, stage_adapted

EXPERT = "experts."  # before the module of an expert's adapter, where they are counted


def kept_numbers(
    model: ModelSettings,
    lora: LoraSettings,
    parallel: ParallelSettings,
    *,
    tokens: int,
    scored: int,
    vocab_rows: int,
    stage: int,
) -> int:
    """Estimate how many numbers are kept for the backward pass, logits included.

    Each layer keeps what `_layer` says; the last one, after its attention, of scored tokens only,
    and up to it of all tokens, as on a GPU: elsewhere their queries are not kept.
    Full recomputation keeps only the residual stream, and one layer. Stage s of p holds p - s
    micro-batches at once. Logits are held three times, in the model's dtype and in float32. FP8
    products keep their inputs in fewer bytes, which is not counted.
    """
    numbers = layers_of(model, parallel, stage=stage)
    modules = {number: Counter[str]() for number in numbers}
    for linear in stage_adapted(model, lora, parallel, stage=stage):
        if (number := layer_number(linear)) is not None:
            modules[number][EXPERT * linear.is_expert + linear.mapping.module] += 1
    layers = [_layer(model, lora, parallel, modules[number], number=number) for number in numbers]
    flying, is_last = parallel.pipeline - stage, stage == parallel.pipeline - 1
    whole = [sum(layer) for layer in layers]
    if model.megatron.get("recompute_granularity") == "full":
        residual = model.hidden_size // _split_by(parallel)
        total = tokens * (len(layers) * flying * residual + max(whole))
    else:
        total = tokens * flying * sum(whole)
        if is_last and model.ends_at_scored and not parallel.sequence:
            total -= (tokens - scored) * layers[-1][1]
    if is_last:
        total += 3 * scored * vocab_rows // parallel.tensor
    return total


def _layer(
    model: ModelSettings,
    lora: LoraSettings,
    parallel: ParallelSettings,
    adapted: Mapping[str, int],
    *,
    number: int,
) -> tuple[int, int]:
    """Return the numbers that a layer keeps for each token: up to its attention, and after it.

    The residual stream and the two normalised inputs (split only by sequence parallelism), and,
    split by tensor parallelism, queries, keys, values before and after the rotation, the
    attention's output, gate, up, and their product. In a layer with experts, the last three are
    those of the shared experts, and `_routed` comes on top.

    With adapters, no gradient of a frozen weight needs its inputs. But the adapters of a layer
    need the same inputs, so these are dropped only where a layer has none: the normalised inputs
    and the product, as the attention itself needs its output. Each adapter keeps its `lora.rank`
    inner numbers. Dropout keeps a mask, half as large as bf16 inputs, and inputs of its own.

    Args:
        adapted: adapters of the layer by Megatron's module, of experts after `EXPERT`; ignored if
            there are none at all.
        number: of the layer, from 0.
    """
    hidden, inner, routed = model.hidden_size, model.ffn_hidden_size, 0
    if layer_matrices(model, number).experts:
        inner = model.moe.shared_ffn_hidden_size or 0
        routed = _routed(model, lora, parallel, adapted)

    def inputs(width: int, module: str) -> int:
        """Return the numbers that a linear layer keeps of its inputs."""
        if lora.rank is None:
            return width
        return (width + (width // 2 if lora.dropout else 0)) * (module in adapted)

    def held(whole: int, split: int, *modules: str) -> int:
        own = (lora.rank or 0) * sum(adapted.get(module, 0) for module in modules)
        return whole // _split_by(parallel) + split // parallel.tensor + own

    split = 4 * model.query_width + 4 * model.key_width
    if lora.rank is not None and lora.dropout and "linear_proj" in adapted:
        split += 3 * model.query_width // 2
    attention = held(hidden + inputs(hidden, "linear_qkv"), split, "linear_qkv", "linear_proj")
    split = 3 * inner + inputs(inner, "linear_fc2")
    rest = held(hidden + inputs(hidden, "linear_fc1"), split, "linear_fc1", "linear_fc2")
    return attention, rest + routed


def _routed(
    model: ModelSettings,
    lora: LoraSettings,
    parallel: ParallelSettings,
    adapted: Mapping[str, int],
) -> int:
    """Return the numbers that router and experts keep for each token of this rank.

    The router keeps three numbers for each expert: logits, scores and weights. A token goes to
    `moe.topk` experts, which are assumed to be spread evenly over the ranks: a rank receives as
    many copies as it sends, in practice the rank with the popular experts more. Each copy is whole
    on all ranks that split its expert. An expert keeps its inputs, and gate, up, their product and
    the product with its weight.
    Frozen experts need neither their inputs nor the last product, but their adapters do.
    """
    moe = model.moe
    assert moe.experts is not None and moe.ffn_hidden_size is not None
    is_trained = lora.rank is None
    keeps_inputs = is_trained or f"{EXPERT}linear_fc1" in adapted
    keeps_product = is_trained or f"{EXPERT}linear_fc2" in adapted
    copy = model.hidden_size * parallel.expert_tensor * keeps_inputs
    copy += (4 + keeps_product) * moe.ffn_hidden_size
    if lora.dropout:
        copy += model.hidden_size * parallel.expert_tensor // 2 * keeps_inputs
        copy += moe.ffn_hidden_size // 2 * keeps_product
    of_experts = sum(n for module, n in adapted.items() if module.startswith(EXPERT))
    inner = (lora.rank or 0) * of_experts * parallel.expert_tensor // moe.experts
    copies = moe.topk * (copy + inner)
    return (3 * moe.experts + copies) // _split_by(parallel)


def _split_by(parallel: ParallelSettings) -> int:
    """Return how many ranks split the residual stream's tokens."""
    return parallel.tensor if parallel.sequence else 1


def scored_share(sft: SftSettings, sampling: SamplingSettings) -> float:
    """Return the share of tokens that the head scores, in the phase where it is larger.

    The head scores the tokens that a denoising step fixes; in a supervised phase the masked tokens,
    half of the completion on average, and all others too if it learns the next token as well, from
    rows that hold the completion twice. The prompt is assumed to be as long as the completion.
    """
    if sft.is_on and sft.autoregressive_weight:
        return 1 / 2
    masked = 1 / 2 if sft.is_on else 0.0
    return max(masked, 1 / sampling.denoising_steps) / 2
