"""Every setting of a run, section by section, and the rules that tie settings together.

`agrpo config` prints this file as a reference. Importing it loads neither torch nor Megatron.
"""

from dataclasses import dataclass, replace
from typing import Any

from agrpo_megatron.config import section, setting

UNMASKING = ("random", "low_confidence", "entropy")
PROPOSALS = ("uniform", "entropy")
STEP_SAMPLERS = ("systematic", "stratified", "batch", "independent")


@dataclass(frozen=True)
class RunSettings:
    """Where a run lives and what makes it repeatable."""

    dir: str = setting("runs/default", "run directory; everything a run writes goes here")
    seed: int = setting(0, "seed of weights, problems, noise and drawn steps", low=0)
    threads: int | None = setting(
        None, "CPU threads of each rank; null shares the cores among the local ranks", low=1
    )
    timeout: float = setting(600.0, "longest wait in a collective", unit="seconds", low=1)


@dataclass(frozen=True)
class ModelSettings:
    """The masked-diffusion transformer; named as Megatron-Core names the same things."""

    family: str = setting("llada", "weight-name family", choices=("llada",))
    load: str | None = setting(
        None,
        "Hugging Face directory, Megatron checkpoint or run directory to start from, architecture "
        "included; null: random",
    )
    num_layers: int = setting(4, "transformer layers", low=1)
    hidden_size: int = setting(128, "width of the residual stream", low=1)
    ffn_hidden_size: int = setting(384, "width of the SwiGLU hidden layer", low=1)
    num_attention_heads: int = setting(4, "attention heads", low=1)
    num_query_groups: int | None = setting(None, "key/value heads (GQA); null: one per head", low=1)
    vocab_size: int | None = setting(None, "rows of the embedding; null: the tokenizer's", low=2)
    mask_token_id: int | None = setting(None, "id of the mask token; null: the tokenizer's", low=0)
    eos_token_id: int | None = setting(None, "end-of-text id; null: the tokenizer's", low=0)
    max_sequence_length: int = setting(4096, "longest row", unit="tokens", low=2)
    rope_theta: float = setting(500000.0, "base of the rotary embedding", low=1)
    norm_epsilon: float = setting(1e-5, "epsilon of RMSNorm", low=0)
    qkv_bias: bool = setting(False, "biases on query, key and value")
    qk_norm: bool = setting(False, "RMSNorm on queries and keys, per head")
    init_std: float = setting(0.02, "standard deviation of random initial weights", low=0)
    megatron: dict[str, Any] = setting({}, "passed to Megatron's TransformerConfig by name")


@dataclass(frozen=True)
class TokenizerSettings:
    """Text to token ids."""

    path: str | None = setting(
        None,
        "sentencepiece .model file or Hugging Face directory; null: the built-in characters",
    )


@dataclass(frozen=True)
class ParallelSettings:
    """How the ranks share the work; one text such as tp2-pp2-cp1-dp2 sets all of it."""

    tensor: int = setting(1, "tensor-parallel ranks", low=1, short="tp")
    sequence: bool = setting(False, "sequence parallelism beside tensor parallelism", short="sp")
    pipeline: int = setting(1, "pipeline stages", low=1, short="pp")
    virtual: int = setting(1, "virtual stages on each pipeline rank", low=1, short="vpp")
    layers: list[int] | None = setting(
        None, "layers of each (virtual) stage in order; null: even, embedding and head counted"
    )
    context: int = setting(1, "ranks that share each row's tokens", low=1, short="cp")
    data: int | None = setting(None, "data-parallel ranks; null: what is left", low=1, short="dp")


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


@dataclass(frozen=True)
class TaskSettings:
    """The problems, their prompts and their reward."""

    name: str = setting("sudoku", "task", choices=("sudoku", "countdown"))
    train_problems: int = setting(20000, "training problems", low=1)
    eval_problems: int = setting(256, "held-out problems, disjoint from training", low=1)
    seed: int = setting(0, "seed of the generated problems, apart from run.seed", low=0)
    options: dict[str, Any] = setting({}, "passed to the task by name; see `agrpo config --tasks`")


@dataclass(frozen=True)
class OptimizerSettings:
    """Megatron's optimizer and learning-rate schedule."""

    learning_rate: float = setting(1e-4, "peak learning rate", low=0)
    min_learning_rate: float = setting(0.0, "learning rate at the end of the decay", low=0)
    decay: str = setting(
        "constant",
        "shape after warm-up",
        choices=("constant", "linear", "cosine", "inverse-square-root"),
    )
    warmup_iterations: int = setting(0, "linear warm-up", unit="iterations", low=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", low=0)
    clip_grad: float = setting(1.0, "gradient-norm clip; 0 turns it off", low=0)
    adam_beta1: float = setting(0.9, "Adam's first decay", low=0, high=1)
    adam_beta2: float = setting(0.99, "Adam's second decay", low=0, high=1)
    distributed: bool = setting(False, "shard optimizer state over the data-parallel ranks")
    megatron: dict[str, Any] = setting({}, "passed to Megatron's OptimizerConfig by name")


@dataclass(frozen=True)
class SftSettings:
    """Supervised fine-tuning on the task's solutions, before reinforcement learning."""

    iterations: int = setting(0, "optimizer steps; 0 skips the phase", low=0)
    batch_size: int = setting(128, "examples per optimizer step, all ranks together", low=1)
    problems: int | None = setting(
        None, "training problems whose solutions are shown; null: all of them", low=1
    )
    mask_epsilon: float = setting(1e-3, "lowest masking rate t", low=0, high=1)
    optimizer: OptimizerSettings = section(OptimizerSettings, "optimizer of this phase")


@dataclass(frozen=True)
class SamplingSettings:
    """The denoising sampler: which positions are fixed when, and how tokens are drawn."""

    completion_length: int = setting(256, "length of every completion", unit="tokens", low=1)
    block_length: int = setting(32, "block length of semi-autoregressive decoding", low=1)
    denoising_steps: int = setting(128, "forward passes per completion, at most", low=1)
    unmasking: str = setting("random", "which positions are fixed next", choices=UNMASKING)
    temperature: float = setting(1.0, "0 is greedy", low=0)
    top_k: int | None = setting(None, "keep the k likeliest tokens", unit="tokens", low=1)
    top_p: float = setting(1.0, "keep the smallest set with this mass", low=0, high=1)
    threshold: float | None = setting(
        None, "also fix every token at least this probable, beyond the schedule", low=0, high=1
    )
    confidence: str = setting(
        "policy",
        "probability that ranks positions: of the tempered, truncated policy, or LLaDA's own",
        choices=("policy", "untempered"),
    )
    early_end: bool = setting(True, "a row ends after a block that is all end-of-text")
    forbid_mask_token: bool = setting(True, "never draw the mask token (published code: false)")


@dataclass(frozen=True)
class AlgorithmSettings:
    """AGRPO: the policy gradient over denoising steps, and its published choices."""

    name: str = setting(
        "agrpo",
        "agrpo draws mc_samples live steps of every rollout; full_trajectory takes all of them",
        choices=("agrpo", "full_trajectory"),
    )
    prompts_per_iteration: int = setting(16, "problems per iteration, all ranks together", low=1)
    group_size: int = setting(8, "completions per problem", low=2)
    mc_samples: int = setting(8, "denoising steps drawn per rollout (published: 24)", low=1)
    proposal: str = setting("uniform", "distribution that steps are drawn from", choices=PROPOSALS)
    step_sampler: str = setting(
        "systematic",
        "how draws are spread; batch is the published low-discrepancy sampler",
        choices=STEP_SAMPLERS,
    )
    uniform_mix: float = setting(
        0.1,
        "share of uniform in the proposal: bounds step weights by 1/share (published: 0)",
        low=0,
        high=1,
    )
    enumerate_short: bool = setting(
        True, "score every live step once where mc_samples covers them all (published: false)"
    )
    live_steps: str = setting(
        "sampled",
        "steps that are scored: all that ran, or up to the last text token (published)",
        choices=("sampled", "text"),
    )
    baseline: str = setting(
        "mean", "subtracted from the reward", choices=("none", "mean", "leave_one_out")
    )
    scale_by_std: bool = setting(False, "divide advantages by the group's standard deviation")
    clip_low: float = setting(0.2, "ratio clipped below at 1 - clip_low", low=0)
    clip_high: float = setting(0.2, "ratio clipped above at 1 + clip_high", low=0)
    kl_coefficient: float = setting(0.0, "weight of the KL to the frozen reference", low=0)
    normaliser: str = setting(
        "live_steps",
        "mean over each rollout's live steps (published), or over a constant number",
        choices=("live_steps", "constant"),
    )
    normaliser_constant: float | None = setting(
        None, "steps that `constant` divides by; null: sampling.denoising_steps", low=1e-9
    )
    updates_per_iteration: int = setting(1, "optimizer steps on each batch of rollouts", low=1)


@dataclass(frozen=True)
class TrainSettings:
    """The reinforcement-learning loop."""

    iterations: int = setting(100, "rollout-and-update rounds", low=0)
    token_budget: int = setting(16384, "packed tokens per micro-batch and rollout forward", low=1)
    ratio_alarm: float = setting(
        1e-3, "warn when a first update's policy ratio is further from 1 than this", low=0
    )


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out evaluation; null takes the value of `sampling`."""

    interval: int = setting(25, "iterations between evaluations; 0: first and last only", low=0)
    temperature: float = setting(0.0, "0 is greedy", low=0)
    unmasking: str = setting("low_confidence", "as in sampling", choices=UNMASKING)
    denoising_steps: int | None = setting(None, "as in sampling", low=1)
    block_length: int | None = setting(None, "as in sampling", low=1)
    top_k: int | None = setting(None, "as in sampling", low=1)
    top_p: float = setting(1.0, "as in sampling", low=0, high=1)


@dataclass(frozen=True)
class CheckpointSettings:
    """Sharded checkpoints of model, optimizer and schedule."""

    interval: int = setting(50, "iterations between checkpoints; 0: last only", low=0)
    keep: int = setting(2, "newest checkpoints kept", low=1)
    best: str | None = setting(
        "accuracy", "also save and keep the highest of this metric of the evaluations; null: none"
    )
    background: bool = setting(False, "write in a process of its own while training goes on")
    rollouts: bool = setting(
        True, "keep rollouts until a checkpoint has them, so that a restart samples none again"
    )


@dataclass(frozen=True)
class LoggingSettings:
    """What is reported, and where to."""

    wandb: str = setting("offline", "wandb mode", choices=("offline", "online", "disabled"))
    project: str = setting("agrpo", "wandb project")
    name: str | None = setting(None, "wandb run name; null: the run directory's name")
    samples: int = setting(4, "completions kept per iteration and evaluation", low=0)
    live: bool = setting(True, "live terminal view where the terminal allows")


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    run: RunSettings = section(RunSettings, "where a run lives")
    precision: str = setting(
        "fp32", "weights and activations; bf16 keeps fp32 main weights", choices=("fp32", "bf16")
    )
    model: ModelSettings = section(ModelSettings, "the transformer")
    tokenizer: TokenizerSettings = section(TokenizerSettings, "text to ids")
    parallel: ParallelSettings = section(ParallelSettings, "layout of the ranks")
    rollout: RolloutSettings = section(RolloutSettings, "rollouts under a pipeline")
    task: TaskSettings = section(TaskSettings, "problems and reward")
    sft: SftSettings = section(SftSettings, "supervised phase")
    sampling: SamplingSettings = section(SamplingSettings, "rollout sampler")
    algorithm: AlgorithmSettings = section(AlgorithmSettings, "policy gradient")
    optimizer: OptimizerSettings = section(OptimizerSettings, "optimizer of the RL phase")
    ddp: dict[str, Any] = setting({}, "passed to Megatron's DistributedDataParallelConfig by name")
    train: TrainSettings = section(TrainSettings, "RL loop")
    evaluation: EvaluationSettings = section(EvaluationSettings, "held-out evaluation")
    checkpoint: CheckpointSettings = section(CheckpointSettings, "checkpoints")
    logging: LoggingSettings = section(LoggingSettings, "reports")


def evaluation_sampling(settings: Settings) -> SamplingSettings:
    """Return the sampler of evaluation: `sampling` with what `evaluation` overrides."""
    sampling, chosen = settings.sampling, settings.evaluation
    return replace(
        sampling,
        temperature=chosen.temperature,
        unmasking=chosen.unmasking,
        denoising_steps=chosen.denoising_steps or sampling.denoising_steps,
        block_length=chosen.block_length or sampling.block_length,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        threshold=sampling.threshold,
    )
