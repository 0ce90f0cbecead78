"""An estimate of what autograd keeps for the backward pass."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from agrpo_megatron.config.parallel import layer_matrices, layers_of
from agrpo_megatron.config.settings import (
    LoraSettings,
    ModelSettings,
    ParallelSettings,
    SamplingSettings,
    Settings,
    SftSettings,
)
from agrpo_megatron.scaling.adapters import layer_number, stage_adapted

EXPERT = "experts."  # before the module of an expert's adapter, where they are counted
FLOAT32, INT64 = 4, 8  # bytes
LOGITS = 3  # copies of the logits in float32


@dataclass(frozen=True)
class Kernels:
    """Which tensors the kernels keep, and the bytes of their numbers."""

    width: int  # bytes of an activation
    is_fused: bool  # Transformer Engine's layers; else torch's, operation by operation


def kernels_of(settings: Settings) -> Kernels:
    """Return the kernels that settings are planned with: fused ones on GPUs, but for float32."""
    is_float32, spec = settings.precision == "fp32", settings.kernels.layer_spec
    return Kernels(4 if is_float32 else 2, spec == "te" or (spec == "auto" and not is_float32))


def kept_bytes(
    model: ModelSettings,
    lora: LoraSettings,
    parallel: ParallelSettings,
    kernels: Kernels,
    *,
    tokens: int,
    scored: int,
    vocab_rows: int,
    stage: int,
) -> tuple[int, int]:
    """Estimate the most bytes of a forward and backward pass: of the layers, and of the logits.

    Each layer keeps what `_layer` says; the last one, after its attention, of scored tokens only,
    and up to it of all tokens, as on a GPU: elsewhere their queries are not kept.
    Full recomputation keeps only the residual stream; one layer with its gradients takes the place
    of the logits. Stage s of p holds p - s micro-batches at once. Logits are held in the model's
    dtype, and `LOGITS` times in float32: once for the backward pass, the others while the loss is
    computed. FP8 products keep their inputs in fewer bytes, which is not counted. Without
    recomputation, what the backward pass allocates takes the place of what it frees.
    """
    numbers = layers_of(model, parallel, stage=stage)
    modules = {number: Counter[str]() for number in numbers}
    for linear in stage_adapted(model, lora, parallel, stage=stage):
        if (number := layer_number(linear)) is not None:
            modules[number][EXPERT * linear.is_expert + linear.mapping.module] += 1
    layers = [
        _layer(model, lora, parallel, kernels, modules[number], number=number) for number in numbers
    ]
    flying, is_last = parallel.pipeline - stage, stage == parallel.pipeline - 1
    whole = [sum(layer) for layer in layers]
    cuts = is_last and model.ends_at_scored and not parallel.sequence
    again = 0
    if recomputes(model):
        residual = kernels.width * model.hidden_size // _split_by(parallel)
        total = tokens * len(layers) * flying * residual
        again = tokens * (max(whole) + _gradients(model, parallel, kernels))
    else:
        total = tokens * flying * sum(whole)
        if cuts:
            total -= (tokens - scored) * layers[-1][1]
    if not kernels.is_fused:
        total += tokens * flying * 2 * FLOAT32 * model.rotary_width  # cosines and sines
    if not is_last:
        return total + again, 0
    ending = _norm(lora, kernels, model.hidden_size) // _split_by(parallel)
    total += (scored if cuts else tokens) * ending
    logits = scored * (kernels.width + LOGITS * FLOAT32) * vocab_rows // parallel.tensor
    return total + max(0, again - logits), logits


def recomputes(model: ModelSettings) -> bool:
    """Return whether each layer computes its activations once more in the backward pass."""
    return model.megatron.get("recompute_granularity") == "full"


def _gradients(model: ModelSettings, parallel: ParallelSettings, kernels: Kernels) -> int:
    """Return the bytes for each token that the backward pass of one layer allocates.

    Gradients of the residual stream, and of the inputs of the SwiGLU's last product; with experts,
    of the inputs of their last product, and of the copies of tokens that they receive, once in the
    order of the experts and once in that of the tokens.
    """
    split, inner = _split_by(parallel), model.ffn_hidden_size // parallel.tensor
    if model.moe.experts:
        moe = model.moe
        assert moe.ffn_hidden_size is not None
        copies = moe.topk * (2 * model.hidden_size * parallel.expert_tensor + moe.ffn_hidden_size)
        shared = (moe.shared_ffn_hidden_size or 0) // parallel.tensor
        dense = inner if moe.dense_layers else 0
        inner = max(copies // split + shared, dense)
    return kernels.width * (model.hidden_size // split + inner)


def _layer(
    model: ModelSettings,
    lora: LoraSettings,
    parallel: ParallelSettings,
    kernels: Kernels,
    adapted: Mapping[str, int],
    *,
    number: int,
) -> tuple[int, int]:
    """Return the bytes that a layer keeps for each token: up to its attention, and after it.

    Fused kernels keep the residual stream and the two normalised inputs (split only by sequence
    parallelism), and, split by tensor parallelism, queries, keys, values before and after the
    rotation, the attention's output, gate, up, and their product. Torch's operations keep more:
    see `_norm`, `_attention` and `_swiglu`. In a layer with experts, the last three are those of
    the shared experts, and `_routed` comes on top.

    With adapters, no gradient of a frozen weight needs its inputs. But the adapters of a layer
    need the same inputs, so these are dropped only where a layer has none: the normalised inputs
    and the product, as the attention itself needs its output. Each adapter keeps its `lora.rank`
    inner numbers. Dropout keeps a mask, and inputs of its own.

    Args:
        adapted: adapters of the layer by Megatron's module, of experts after `EXPERT`; ignored if
            there are none at all.
        number: of the layer, from 0.
    """
    hidden, inner, routed = model.hidden_size, model.ffn_hidden_size, 0
    has_experts = layer_matrices(model, number).experts > 0
    if has_experts:
        inner = model.moe.shared_ffn_hidden_size or 0
        routed = _routed(model, lora, parallel, kernels, adapted)

    def inputs(width: int, module: str) -> int:
        """Return the numbers that a linear layer keeps of its inputs."""
        if lora.rank is None:
            return width
        return (width + _mask(lora, kernels, width)) * (module in adapted)

    def held(whole: int, split: int, *modules: str) -> int:
        own = (lora.rank or 0) * sum(adapted.get(module, 0) for module in modules)
        return whole // _split_by(parallel) + split // parallel.tensor + kernels.width * own

    def normed(module: str) -> int:
        return _norm(lora, kernels, hidden, inputs=inputs(hidden, module))

    projected = inputs(model.query_width, "linear_proj")
    split = _attention(model, lora, kernels, projected=projected)
    attention = held(normed("linear_qkv"), split, "linear_qkv", "linear_proj")
    split = kernels.width * (_swiglu(kernels) * inner + inputs(inner, "linear_fc2"))
    # Router and experts read the normalised inputs, whatever is trained.
    whole = _norm(lora, kernels, hidden) if has_experts else normed("linear_fc1")
    rest = held(whole, split, "linear_fc1", "linear_fc2")
    return attention, rest + routed


def _mask(lora: LoraSettings, kernels: Kernels, width: int) -> int:
    """Return the numbers of a mask of dropout: a byte each, or on the CPU those of its inputs."""
    return 0 if not lora.dropout else width // 2 if kernels.is_fused else width


def _norm(lora: LoraSettings, kernels: Kernels, hidden: int, *, inputs: int | None = None) -> int:
    """Return the bytes of a norm for each token: the residual stream, and the normalised inputs.

    Torch's norm keeps its inputs in float32, which is a copy of a bf16 residual stream, and before
    the weight that is trained the normalised inputs.

    Args:
        inputs: numbers that the linear layer after it keeps; None: all of them.
    """
    after = hidden if inputs is None else inputs
    if kernels.is_fused:
        return kernels.width * (hidden + after)
    trained = hidden if lora.rank is None else 0
    return FLOAT32 * hidden + kernels.width * (trained + after) + FLOAT32


def _attention(
    model: ModelSettings, lora: LoraSettings, kernels: Kernels, *, projected: int
) -> int:
    """Return the bytes of an attention for each token.

    Torch's keeps the product of query, key and value, the rotated queries and keys, its output, and
    a sum for each head; the projection a copy of the output. Norms of queries and keys keep their
    inputs in float32, and what comes before and after the weight.

    Args:
        projected: numbers that the projection keeps of its inputs.
    """
    query, key = model.query_width, model.key_width
    if kernels.is_fused:
        split = 4 * query + 4 * key
        if lora.rank is not None and lora.dropout and projected:
            split += 3 * query // 2
        return kernels.width * split
    total = kernels.width * (3 * query + 3 * key + projected) + FLOAT32 * model.num_attention_heads
    if model.qk_norm:
        copies = 0 if kernels.width == FLOAT32 else FLOAT32
        total += (query + key) * (copies + kernels.width)
    return total


def _swiglu(kernels: Kernels) -> int:
    """Return how often a SwiGLU keeps as many numbers as it is wide, its product left out.

    Gate, up and the activated gate; torch's operations also a copy of up.
    """
    return 3 if kernels.is_fused else 4


def _routed(
    model: ModelSettings,
    lora: LoraSettings,
    parallel: ParallelSettings,
    kernels: Kernels,
    adapted: Mapping[str, int],
) -> int:
    """Return the bytes that router and experts keep for each token of this rank.

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
    copy += (_swiglu(kernels) + 1 + keeps_product) * moe.ffn_hidden_size
    copy += _mask(lora, kernels, model.hidden_size * parallel.expert_tensor) * keeps_inputs
    copy += _mask(lora, kernels, moe.ffn_hidden_size) * keeps_product
    of_experts = sum(n for module, n in adapted.items() if module.startswith(EXPERT))
    inner = (lora.rank or 0) * of_experts * parallel.expert_tensor // moe.experts
    copies = moe.topk * (copy + inner)
    total = kernels.width * (3 * moe.experts + copies)
    if not kernels.is_fused:
        total += moe.topk * INT64  # where each copy belongs
    return total // _split_by(parallel)


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
