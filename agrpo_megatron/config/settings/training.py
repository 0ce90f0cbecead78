"""Settings of the task, the optimizer and the loops."""

from dataclasses import dataclass
from typing import Any, Literal

from agrpo_megatron.config.schema import section, setting
from agrpo_megatron.config.settings.sampling import UNMASKING
from agrpo_megatron.config.values import MOST_SEED

MOST_BETA = 1 - 1e-9  # Adam divides by 1 - beta


@dataclass(frozen=True)
class GraderSettings:
    """Grading in worker processes while sampling continues; tasks with own limits use none."""

    workers: int = setting(2, "processes of each rank that grades", low=1)
    seconds: float = setting(10.0, "wall time of one reward", unit="seconds", low=0.1)
    memory: int = setting(2048, "memory that one reward may add", unit="MiB", low=64)
    failed_score: float = setting(0.0, "score where a reward raises, hangs or runs out of memory")
    most_failed: float = setting(
        0.5,
        "largest share of failed rewards in the first evaluation; more end the run; 1: never",
        low=0,
        high=1,
    )


@dataclass(frozen=True)
class TaskSettings:
    """The problems, their prompts and their reward."""

    name: str = setting("sudoku", "built-in task, your FILE.py, or mixture")
    train_problems: int | None = setting(
        None, "most training problems; null: all of a file, 20000 generated ones", low=1
    )
    eval_problems: int | None = setting(
        None, "most held-out problems; null: all of a file, 256 generated ones", low=1
    )
    seed: int = setting(
        0, "seed of generated problems and of drawn subsets, not run.seed", low=0, high=MOST_SEED
    )
    options: dict[str, Any] = setting({}, "passed to the task by name; see `agrpo config --tasks`")
    mixture: dict[str, Any] = setting(
        {}, "tasks of a mixture by label: each has name, weight, options, problems as here"
    )
    leaks: str = setting(
        "drop",
        "training problems, and rows of sft.data, that are also held out",
        choices=("drop", "refuse", "keep"),
    )
    prompt_tokens: int | None = setting(
        None, "longest prompt; null: what the completion leaves of the row", low=1
    )
    long_prompts: str = setting("refuse", "action on longer prompts", choices=("refuse", "drop"))
    pass_rates: str | None = setting(
        None, "completions.jsonl of an evaluation of training problems: a curriculum's filter"
    )
    pass_rate_low: float = setting(0.0, "lowest pass rate that is trained on", low=0, high=1)
    pass_rate_high: float = setting(1.0, "highest pass rate that is trained on", low=0, high=1)
    grader: GraderSettings = section(GraderSettings, "worker processes that grade")


@dataclass(frozen=True)
class OptimizerSettings:
    """Megatron's optimizer and learning-rate schedule."""

    learning_rate: float = setting(1e-4, "peak learning rate", low=0)
    min_learning_rate: float = setting(0.0, "learning rate at the end of the decay", low=0)
    decay: str = setting(
        "constant", "after warm-up", choices=("constant", "linear", "cosine", "inverse-square-root")
    )
    warmup_iterations: int = setting(0, "linear warm-up", unit="iterations", low=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", low=0)
    clip_grad: float = setting(1.0, "gradient-norm clip; 0 turns it off", low=0)
    adam_beta1: float = setting(0.9, "Adam's first decay", low=0, high=MOST_BETA)
    adam_beta2: float = setting(0.99, "Adam's second decay", low=0, high=MOST_BETA)
    distributed: bool = setting(False, "shard optimizer state over the data-parallel ranks")
    moments: str = setting(
        "fp32",
        "Adam's two moments, under fp8 the second in bf16; less than fp32 needs Transformer Engine "
        "and distributed",
        choices=("fp32", "bf16", "fp8"),
    )
    main_gradients: str = setting(
        "fp32",
        "dtype of the summed gradients; bf16 needs Transformer Engine and distributed",
        choices=("fp32", "bf16"),
    )
    offload: float = setting(
        0.0, "share of states kept and updated on the CPU; needs distributed", low=0, high=1
    )
    megatron: dict[str, Any] = setting({}, "passed to Megatron's OptimizerConfig by name")


@dataclass(frozen=True)
class TrainSettings:
    """The reinforcement-learning loop."""

    iterations: int = setting(100, "rollout-and-update rounds", low=0)
    flops: float | None = setting(
        None, "end after the iteration that reaches so many FLOPs, rollouts included", low=1
    )
    token_budget: int = setting(16384, "packed tokens per micro-batch and rollout forward", low=1)
    from_rollouts: str | None = setting(
        None, "run directory whose stored rollouts are replayed, nothing is sampled; null: sample"
    )
    async_steps: int = setting(
        0,
        "1: an iteration's rollouts are sampled before the update of the iteration before, with "
        "the weights before it, and rewards are graded in the meantime; importance weights "
        "(algorithm.rollout_correction) correct for the update between",
        low=0,
        high=1,
    )
    ratio_alarm: float = setting(
        1e-3, "warn when a first update's policy ratio is further from 1 than this", low=0
    )
    mismatch_alarm: float = setting(
        1.05, "warn when mismatch/mean, of rollout and training log-probs, is over this", low=1
    )
    mismatch_tail_alarm: float = setting(1.5, "warn when mismatch/p99 is over this", low=1)
    stop_metric: str | None = setting(None, "end early by this evaluation metric; null: never")
    stop_target: float | None = setting(None, "end once train.stop_metric is this high")
    stop_patience: int | None = setting(
        None, "end after this many evaluations without a higher train.stop_metric", low=1
    )


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out evaluation; null takes the value of `sampling`."""

    interval: int = setting(25, "iterations between evaluations; 0: first and last only", low=0)
    temperature: float = setting(0.0, "0 is greedy", low=0)
    unmasking: str = setting("low_confidence", "as in sampling", choices=UNMASKING)
    denoising_steps: int | None = setting(None, "as in sampling", low=1)
    block_length: int | None = setting(None, "as in sampling", low=1)
    top_k: int | None = setting(None, "as in sampling; null: all tokens", low=1)
    top_p: float = setting(1.0, "as in sampling", low=0, high=1)
    few_shot: int = setting(
        0, "training problems with their solutions before each held-out problem", low=0
    )
    # The rest is for `agrpo evaluate` only.
    completion_lengths: list[int] | None = setting(
        None, "`agrpo evaluate` at each of these; null: as in sampling", unit="tokens"
    )
    steps: list[int] | None = setting(
        None, "`agrpo evaluate` with each of these denoising steps; null: denoising_steps"
    )
    tokens_per_step: list[int] | None = setting(
        None, "instead of steps: length / value, for each value (d1: 2)", unit="tokens"
    )
    tasks: dict[str, Any] = setting(
        {}, "`agrpo evaluate` on these, by label, as in task.mixture; empty: the task itself"
    )
    split: str = setting(
        "eval", "`agrpo evaluate`: train gives a curriculum's pass rates", choices=("eval", "train")
    )
    samples: int = setting(1, "`agrpo evaluate`: completions per problem; more give pass@k", low=1)
    batch_size: int | None = setting(
        None, "problems between two writes of `agrpo evaluate`; null: some rollout forwards", low=1
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """Sharded checkpoints of model, optimizer and schedule."""

    interval: int = setting(50, "iterations between checkpoints; 0: last only", low=0)
    keep: int = setting(2, "newest checkpoints kept of each phase", low=1)
    best: str | None = setting("accuracy", "keep the best by this evaluation metric; null: none")
    background: bool = setting(False, "write in a separate process while training continues")
    rollouts: bool = setting(True, "keep rollouts for restarts until a checkpoint includes them")
    keep_rollouts: bool = setting(
        False, "keep all graded rollouts of the run, for train.from_rollouts of other runs"
    )


@dataclass(frozen=True)
class LoggingSettings:
    """Reports, wandb and TensorBoard."""

    wandb: str = setting("offline", "wandb mode", choices=("offline", "online", "disabled"))
    project: str = setting("agrpo", "wandb project")
    name: str | None = setting(None, "wandb run name; null: the run directory's name")
    tensorboard: bool | Literal["auto"] = setting(
        False, "write TensorBoard's event files; auto: where its package is installed"
    )
    samples: int = setting(4, "completions kept per iteration and evaluation", low=0)
    live: bool = setting(True, "live terminal view where the terminal allows")
