"""Settings of the supervised phase."""

from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.schema import section, setting
from agrpo_megatron.config.settings.preferences import PreferenceSettings
from agrpo_megatron.config.settings.training import OptimizerSettings

FORMATS = ("replies", "texts")
TURNS = ("random", "last", "each", "all")
PADDING = ("none", "batch", "block", "completion")


@dataclass(frozen=True)
class SftSettings:
    """Supervised fine-tuning before reinforcement learning: on rows of data, or on solutions."""

    iterations: int = setting(0, "optimizer steps; 0 without epochs skips the phase", low=0)
    epochs: float | None = setting(
        None, "passes over the data, from which iterations follow; null: iterations counts", low=0
    )
    batch_size: int = setting(128, "examples per optimizer step, all ranks together", low=1)
    problems: int | None = setting(None, "problems whose solutions are used; null: all", low=1)
    data: str | list[str] | dict[str, Any] | None = setting(
        None,
        "rows to learn from: a file or Hugging Face data set, a list of them, or a mixture by "
        "label, each with data, weight, epochs, columns, chat; null: the task's solutions",
    )
    format: str = setting(
        "replies",
        "what rows of data hold: prompts and replies, or raw texts, which follow one another with "
        "end-of-text between them and are cut into rows of row_tokens (continued pre-training)",
        choices=FORMATS,
    )
    document_mask: bool = setting(
        True,
        "a token of raw texts sees only those of its own text (LLaDA2); false: all of its row",
    )
    columns: dict[str, Any] = setting(
        {},
        "names of unusual columns: of messages, or of prompt and reply; input, system, history; "
        "of raw texts: text",
    )
    chat: bool | None = setting(
        None, "put texts in the chat template; null: all but prompt and completion, as TRL does"
    )
    turns: str = setting(
        "random",
        "the replies of a conversation that are trained: one at random in each epoch (LLaDA), the "
        "last, each in a row of its own, or all in one row, where earlier ones see later turns",
        choices=TURNS,
    )
    padding: str | None = setting(
        None,
        "end-of-text that is trained after a reply: none, up to the longest row of the batch "
        "(LLaDA), to the end of its block (SDAR), or to sampling.completion_length; null: block "
        "for a model with blocks, else batch, or none with sft.loss=vrpo",
        choices=PADDING,
    )
    row_tokens: int | None = setting(
        None, "longest row; null: model.max_sequence_length", unit="tokens", low=2
    )
    long_rows: str = setting("refuse", "action on longer rows", choices=("refuse", "drop"))
    eval_data: str | None = setting(None, "held-out rows, a file or data set like data")
    eval_fraction: float = setting(
        0.0, "share of the rows of data that is held out, chosen by their content", low=0, high=0.9
    )
    eval_interval: int = setting(
        0, "iterations between two held-out losses; 0: only at the end", low=0
    )
    mask_epsilon: float = setting(1e-3, "lowest masking rate t", low=0, high=1)
    diffusion_weight: float = setting(1.0, "weight of the cross-entropy of masked tokens", low=0)
    autoregressive_weight: float = setting(
        0.0,
        "weight of the cross-entropy of the response's next tokens, in the same rows; for "
        "model.attention=causal_context, whose published loss is 1 with diffusion_weight 0.3",
        low=0,
    )
    anneal_iterations: int = setting(
        0,
        "first iterations, in which each token sees a growing share of the tokens after it, from "
        "none to all (autoregressive weights, model.attention=full); 0: none",
        low=0,
    )
    block_schedule: list[str] | None = setting(
        None,
        "block lengths of the first iterations, with how many each holds, such as [1x100, 4x100, "
        "fullx500]; then model.attention holds (LLaDA2); null: from the start",
    )
    balance_loss: float = setting(
        0.0, "weight of the loss that spreads a micro-batch's tokens over the experts", low=0
    )
    expert_bias_rate: float = setting(
        0.0, "step of each expert's bias, in each update, towards equal counts of tokens", low=0
    )
    loss: str = setting(
        "denoising",
        "cross-entropy of masked tokens, or of pairs of a chosen and a rejected answer (VRPO)",
        choices=("denoising", "vrpo"),
    )
    preferences: PreferenceSettings = section(PreferenceSettings, "sft.loss=vrpo")
    optimizer: OptimizerSettings = section(OptimizerSettings, "optimizer of this phase")

    @property
    def is_on(self) -> bool:
        """Return whether the run has a supervised phase."""
        return self.iterations > 0 or self.epochs is not None

    @property
    def has_texts(self) -> bool:
        """Return whether the run learns from raw texts."""
        return self.is_on and self.format == "texts"

    @property
    def has_schedule(self) -> bool:
        """Return whether attention follows a schedule, see `config.annealing`."""
        return self.anneal_iterations > 0 or self.block_schedule is not None

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss needs the log-probs of the frozen start."""
        return self.is_on and self.loss == "vrpo"
