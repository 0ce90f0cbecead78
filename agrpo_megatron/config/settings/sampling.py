"""Settings of the denoising sampler."""

from dataclasses import dataclass

from agrpo_megatron.config.schema import setting

UNMASKING = ("random", "low_confidence", "entropy", "margin", "bernoulli", "leftmost")
POLICIES = ("exact", "cached", "approximate")
MODEL_FREE = ("random", "bernoulli", "leftmost")  # orders that do not depend on the model
UNSET = 0  # of a setting whose default follows from others


@dataclass(frozen=True)
class SamplingSettings:
    """The denoising sampler: which positions are fixed when, and how tokens are drawn."""

    completion_length: int = setting(256, "length of every completion", unit="tokens", low=1)
    block_length: int = setting(
        UNSET,
        "block length of semi-autoregressive decoding; if not written, the largest divisor of "
        "completion_length up to 32, or all of it under Dream's schedule",
        unit="tokens",
        low=1,
    )
    block_origin: str = setting(
        "completion",
        "where the first block begins: at the completion, or at the row's first token (SDAR), so "
        "that it may hold the end of the prompt, and a completion has one block more",
        choices=("completion", "row"),
    )
    denoising_steps: int = setting(
        UNSET,
        "forward passes per completion, at most; edits may add some; if not written, the most up "
        "to 128 that fit the blocks",
        low=1,
    )
    schedule: str = setting(
        "uniform", "tokens per step: equal (LLaDA) or by Dream's time", choices=("uniform", "dream")
    )
    unmasking: str = setting("random", "which positions are fixed next", choices=UNMASKING)
    policy: str = setting(
        "exact",
        "model.attention=full: each step computes all tokens; or, after a block's first step, the "
        "block alone, with the others' keys and values of that step: cached trains what it "
        "samples, approximate trains the exact policy and weighs the difference",
        choices=POLICIES,
    )
    temperature: float = setting(1.0, "0 is greedy", low=0)
    top_k: int | None = setting(None, "keep the k likeliest tokens", unit="tokens", low=1)
    top_p: float = setting(1.0, "keep the smallest set with this mass", low=0, high=1)
    truncation: str = setting(
        "top_k_first",
        "top-p applies to what top-k kept, or before it and to greedy decoding as well (Dream)",
        choices=("top_k_first", "top_p_first"),
    )
    threshold: float | None = setting(
        None, "also fix every token at least this probable, beyond the schedule", low=0, high=1
    )
    edit_threshold: float | None = setting(
        None,
        "overwrite fixed tokens of the open block by a drawn other one at least this probable "
        "(LLaDA2.1); null: never",
        low=0,
        high=1,
    )
    edit_steps: int = setting(
        16, "with edits: more steps of a block once it has no mask, while they edit; at most", low=0
    )
    confidence: str = setting(
        "policy",
        "probability that ranks positions: of the tempered, truncated policy; before top-k and "
        "top-p (SDAR); or LLaDA's own",
        choices=("policy", "tempered", "untempered"),
    )
    early_end: bool = setting(True, "a row ends after a block that is all end-of-text")
    end_at_stop: bool = setting(
        False, "a row ends after a block that holds a token which ends texts (SDAR)"
    )
    forbid_mask_token: bool = setting(True, "never draw the mask token (published code: false)")
    position_temperature: float | None = setting(
        None,
        "unmasking=entropy: draw positions, each turn by exp(-entropy / this); null: take the "
        "lowest entropies",
        low=1e-3,
    )
    record_drawn: bool = setting(
        False,
        "record the tokens that a step puts back, too (for algorithm.scoring=augmented)",
    )

    def __post_init__(self) -> None:
        """Fill what was not written, so that a short completion needs no other setting."""
        length, block = self.completion_length, self.block_length
        if block == UNSET:
            is_whole = self.schedule == "dream"
            block = length if is_whole else next(n for n in range(32, 0, -1) if length % n == 0)
            object.__setattr__(self, "block_length", block)
        if self.denoising_steps == UNSET:
            blocks = max(1, length // block)
            steps = max(1, min(128, length) // blocks) * blocks
            object.__setattr__(self, "denoising_steps", steps)

    @property
    def most_blocks(self) -> int:
        """The most blocks of a completion."""
        is_split = self.block_origin == "row" and self.block_length > 1
        return self.completion_length // self.block_length + is_split

    @property
    def most_steps(self) -> int:
        """The most forward passes of a completion."""
        blocks = self.completion_length // self.block_length
        steps = self.denoising_steps + self.denoising_steps // blocks * (self.most_blocks - blocks)
        return steps + self.edit_steps * self.most_blocks * (self.edit_threshold is not None)

    @property
    def is_cached(self) -> bool:
        """Whether steps reuse keys and values of their block's first step."""
        return self.policy != "exact"

    @property
    def is_cut(self) -> bool:
        """Whether top-k or top-p leave out candidates."""
        return self.top_k is not None or self.top_p < 1

    @property
    def foresees_positions(self) -> bool:
        """Whether the masked positions that a step fixes are known before its forward pass."""
        return self.unmasking in MODEL_FREE and self.threshold is None
