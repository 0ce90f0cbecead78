"""Settings of the model, its layout and the run directory."""

from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.schema import section, setting
from agrpo_megatron.config.settings.moe import MoeSettings
from agrpo_megatron.config.values import MOST_SEED


@dataclass(frozen=True)
class RunSettings:
    """The run directory, and what makes a run repeatable."""

    dir: str = setting("runs/default", "run directory; everything a run writes goes here")
    seed: int = setting(
        0, "seed of weights, problems, noise and drawn steps", low=0, high=MOST_SEED
    )
    threads: int | None = setting(
        None,
        "CPU threads of each rank; null: a share of the cores; for a single rank OMP_NUM_THREADS",
        low=1,
        high=1024,
    )
    timeout: float = setting(600.0, "longest wait in a collective", unit="seconds", low=1)


@dataclass(frozen=True)
class ModelSettings:
    """The masked-diffusion transformer; named as Megatron-Core names the same things."""

    family: str = setting(
        "llada",
        "weight-name family",
        choices=(
            "llada",
            "dream",
            "sdar",
            "nemotron_diffusion",
            "sdar_moe",
            "llada_moe",
            "llada2_moe",
            "llama",
            "qwen2",
            "qwen3",
        ),
    )
    load: str | None = setting(
        None,
        "Hugging Face directory, Megatron checkpoint or run directory to start from, architecture "
        "included; null: random",
    )
    num_layers: int = setting(4, "transformer layers", low=1)
    hidden_size: int = setting(128, "width of the residual stream", low=1)
    ffn_hidden_size: int = setting(384, "width of the SwiGLU hidden layer", low=1)
    moe: MoeSettings = section(MoeSettings, "experts in place of the SwiGLU")
    num_attention_heads: int = setting(4, "attention heads", low=1)
    num_query_groups: int | None = setting(None, "key/value heads (GQA); null: one per head", low=1)
    head_dim: int | None = setting(
        None, "width of a head; null: hidden_size / num_attention_heads", low=1
    )
    vocab_size: int | None = setting(None, "rows of the embedding; null: the tokenizer's", low=2)
    mask_token_id: int | None = setting(None, "id of the mask token; null: the tokenizer's", low=0)
    eos_token_id: int | None = setting(None, "end-of-text id; null: the tokenizer's", low=0)
    max_sequence_length: int = setting(4096, "longest row", unit="tokens", low=2)
    rope_theta: float = setting(500000.0, "base of the rotary embedding", low=1)
    rotary_fraction: float = setting(
        1.0, "share of a head's numbers that rotate, from the first", low=0.01, high=1
    )
    rope_scaling: str = setting(
        "yarn",
        "what rope_factor and the betas mean: YaRN, or the scaling of Llama 3.1",
        choices=("yarn", "llama3"),
    )
    rope_factor: float = setting(
        1.0, "YaRN: rows may be so many times longer than rope_original_length; 1: none", low=1
    )
    rope_original_length: int | None = setting(
        None,
        "longest row before rope_factor and query_scale_beta; null without them",
        unit="tokens",
        low=1,
    )
    rope_beta_fast: float = setting(
        32.0,
        "YaRN: turns within rope_original_length from which a frequency stays as it is",
        low=0.01,
    )
    rope_beta_slow: float = setting(
        1.0, "YaRN: turns up to which a frequency is divided by rope_factor", low=0.01
    )
    rope_attention_factor: float = setting(1.0, "YaRN: factor of rotated queries and keys", low=0)
    query_scale_beta: float = setting(
        0.0,
        "queries at position p grow by 1 + this * log(1 + floor(p / rope_original_length))",
        low=0,
    )
    norm_epsilon: float = setting(1e-5, "epsilon of RMSNorm", low=0)
    tie_embeddings: bool = setting(
        False,
        "the head has the weights of the embedding; false for tied weights of model.load: the head "
        "starts as their copy",
    )
    qkv_bias: bool = setting(False, "biases on query, key and value")
    qk_norm: bool = setting(False, "RMSNorm on queries and keys, per head")
    shift: bool = setting(False, "the state at position i - 1 predicts token i (Dream)")
    attention: str = setting(
        "full",
        "what a token sees: its row; the blocks up to its own (SDAR); the tokens before its block "
        "one by one, and its block; or only the tokens before it (autoregressive; no run has it)",
        choices=("full", "block_causal", "causal_context", "causal"),
    )
    block_length: int | None = setting(None, "tokens of a block; null with attention=full", low=1)
    init_std: float = setting(0.02, "standard deviation of random initial weights", low=0)
    megatron: dict[str, Any] = setting({}, "passed to Megatron's TransformerConfig by name")

    @property
    def is_known(self) -> bool:
        """Whether the architecture is set, or was read from `load`."""
        return self.load is None or self.vocab_size is not None

    @property
    def has_blocks(self) -> bool:
        """Whether tokens attend by blocks, which the model decodes one after another."""
        return self.attention in ("block_causal", "causal_context")

    @property
    def head_width(self) -> int:
        """The width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """The numbers of a head that rotate, an even count."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def moe_layers(self) -> int:
        """How many layers have experts: all but the first `moe.dense_layers`."""
        return 0 if self.moe.experts is None else self.num_layers - self.moe.dense_layers

    @property
    def ends_at_scored(self) -> bool:
        """Whether the last layer, after its attention, runs on scored tokens only.

        Not with experts, which would be counted and replayed for some tokens only.
        """
        return not self.moe_layers

    @property
    def query_width(self) -> int:
        """The width of all queries together, and of the attention's output."""
        return self.head_width * self.num_attention_heads

    @property
    def key_width(self) -> int:
        """The width of all keys together, and of all values."""
        return self.head_width * (self.num_query_groups or self.num_attention_heads)


@dataclass(frozen=True)
class TokenizerSettings:
    """Text to token ids."""

    path: str | None = setting(
        None,
        "sentencepiece .model file or Hugging Face directory; null: that of model.load, else the "
        "built-in characters",
    )
    chat_template: str | None = setting(
        None,
        "llada, dream, plain, a .jinja file, or the name of one of the tokenizer's; null: the "
        "tokenizer's own, or by its tokens",
    )


@dataclass(frozen=True)
class ParallelSettings:
    """How the ranks share the work; one text such as tp2-pp2-cp1-dp2 sets all of it."""

    tensor: int = setting(1, "tensor-parallel ranks", low=1, short="tp")
    sequence: bool = setting(False, "sequence parallelism with tensor parallelism", short="sp")
    pipeline: int = setting(1, "pipeline stages", low=1, short="pp")
    virtual: int = setting(1, "virtual stages on each pipeline rank", low=1, short="vpp")
    layers: list[int] | None = setting(
        None, "layers of each (virtual) stage in order; null: even, embedding and head counted"
    )
    context: int = setting(1, "ranks that share each row's tokens", low=1, short="cp")
    expert: int = setting(1, "ranks that share the experts of a layer", low=1, short="ep")
    expert_tensor: int = setting(
        1, "tensor-parallel ranks of each expert: 1, or as many as `tensor`", low=1, short="etp"
    )
    data: int | None = setting(None, "data-parallel ranks; null: all remaining", low=1, short="dp")


@dataclass(frozen=True)
class RolloutSettings:
    """How rollouts use the ranks."""

    parallel: str | None = setting(
        None, "layout of the rollouts, such as tp4-pp1; null: the training layout, nothing moves"
    )
    schedule: str = setting(
        "ring",
        "under a pipeline: ring keeps every stage busy, lockstep is Megatron's own schedule",
        choices=("ring", "lockstep"),
    )
    groups: int | None = setting(
        None, "groups of rows in flight; null: twice the pipeline stages, 1 without", low=1
    )
    cached: bool | None = setting(
        None,
        "compute finished blocks once and keep their keys and values: the same completions, for "
        "block models; null: where it is possible",
    )
    cache_memory: float = setting(
        8.0, "largest cache of keys and values on each rank", unit="GiB", low=1e-6
    )
    release: str = setting(
        "none",
        "memory of updates that is free during rollouts and evaluations: nothing, gradients, or "
        "also the optimizer's states and main weights, which move to the host and back",
        choices=("none", "gradients", "optimizer"),
    )
    rows: int | None = setting(
        None,
        "most rows of a replica in one forward; null: as many as train.token_budget holds. Fewer "
        "rows let worker processes start rewards earlier",
        low=1,
    )
