"""Settings of FP8 and of the kernels that compute."""

from dataclasses import dataclass

from agrpo_megatron.config.schema import setting

PRECISIONS = ("fp32", "bf16", "fp8")
RECIPES = ("blockwise", "tensorwise", "delayed", "mxfp8")


@dataclass(frozen=True)
class Fp8Settings:
    """Details of `precision=fp8`, in rollouts and training."""

    recipe: str | None = setting(
        None,
        "how values are scaled: by blocks, by tensor, by the tensor's past (supervised phase "
        "only), or by 32 values as Blackwell does; null: blockwise, on Blackwell mxfp8",
        choices=RECIPES,
    )
    bf16_first_layers: int = setting(0, "layers at the start that stay bf16", low=0)
    bf16_last_layers: int = setting(0, "layers at the end that stay bf16", low=0)
    primary_weights: bool = setting(False, "keep layers' weights in FP8, with fp32 main weights")


@dataclass(frozen=True)
class KernelSettings:
    """Which kernels compute; `agrpo doctor` shows what a machine has and what a run uses."""

    layer_spec: str = setting(
        "auto",
        "layers: Transformer Engine's fused ones (te) or torch's (local); auto: te if it and a "
        "GPU are found and precision is not fp32",
        choices=("auto", "local", "te"),
    )
    deterministic: bool = setting(False, "repeat bit by bit on the same GPUs; slower attention")
    batch_invariant: bool = setting(
        False,
        "a row's result does not depend on the other rows, so rollout and training agree bit "
        "by bit; slower; needs te and flash attention 3 or 4",
    )
    cuda_graphs: bool = setting(
        False, "replay rollout forwards as CUDA graphs, by length; needs te, pp1 and cp1"
    )
    block_attention: str = setting(
        "auto",
        "attention of block models: torch's SDPA, row by row, or FlexAttention, all rows at once; "
        "auto: flex on a GPU",
        choices=("auto", "sdpa", "flex"),
    )
