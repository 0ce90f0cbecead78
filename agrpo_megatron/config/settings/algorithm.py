"""Settings of the policy gradient: estimator, advantages, objective."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from agrpo_megatron.config.own_code import is_file_name
from agrpo_megatron.config.schema import setting
from agrpo_megatron.config.settings.estimators import ENTRIES, LOSSES

PROPOSALS = ("uniform", "entropy", "gradient")
STEP_SAMPLERS = ("distinct", "blocks", "systematic", "stratified", "batch", "independent")
STATES = (
    "full",
    "random",
    "random_count",
    "blocks",
    "coupled",
    "coupled_and_full",
    "counts",
    "coupled_counts",
    "quadrature",
)
SCORING = ("token", "augmented", "positions")
NORMALISERS = ("live_steps", "all_steps", "same_step", "rows", "tokens", "constant", "sum")


@dataclass(frozen=True)
class AlgorithmSettings:
    """The policy gradient; null takes the value of the estimator, see docs/estimators.md."""

    name: str = setting("agrpo", f"estimator: {', '.join(ENTRIES)}, or your FILE.py:FUNCTION")
    prompts_per_iteration: int = setting(16, "problems per iteration, all ranks together", low=1)
    group_size: int = setting(8, "completions per problem", low=2)
    updates_per_iteration: int = setting(1, "optimizer steps on each batch of rollouts", low=1)
    resample_rounds: int = setting(
        0, "rounds that replace groups of equal rewards by other problems (published: 0)", low=0
    )

    # Rows: which states are scored.
    mc_samples: int | Literal["auto"] | None = setting(
        None,
        "drawn denoising steps, or masks, per rollout; null: 8 for agrpo (published: 24); auto: "
        "the number with the most signal for the work, measured during the run",
        low=1,
    )
    auto_share: float = setting(
        0.05,
        "mc_samples=auto: work of measuring over that of iterations, after the first measurement",
        low=0.001,
        high=1,
    )
    proposal: str = setting(
        "gradient",
        "steps are drawn by length of the gradient, or summed entropy (published), or uniformly",
        choices=PROPOSALS,
    )
    step_sampler: str = setting(
        "distinct",
        "how draws are spread: distinct never draws a step twice; blocks draws all steps of a "
        "block or none, for sampling.policy=cached; batch is published",
        choices=STEP_SAMPLERS,
    )
    allocation: str = setting(
        "advantage",
        "draws per rollout: equal, or more where advantage and gradient are large; same total",
        choices=("equal", "advantage"),
    )
    uniform_mix: float = setting(
        0.1, "uniform share of the proposal: step weights <= 1/share (published: 0)", low=0, high=1
    )
    enumerate_short: bool = setting(
        True, "score every live step once where mc_samples covers them all (published: false)"
    )
    live_steps: str = setting(
        "sampled",
        "steps that are scored: all that ran, or up to the last text token (published)",
        choices=("sampled", "text"),
    )
    scoring: str = setting(
        "token",
        "scored of a step: the tokens that it keeps; also those that it draws and puts back; or "
        "also its draw of positions",
        choices=SCORING,
    )
    merge_steps: int | None = setting(
        None,
        "tracerl: denoising steps scored from the first one's state; block_just_grpo: tokens of "
        "each block scored from one state",
        low=1,
    )
    states: str | None = setting(
        None, "masks of the finished completion, for one-shot and ELBO methods", choices=STATES
    )
    mask_low: float | None = setting(None, "lowest masking rate of such a mask", low=0, high=1)
    mask_high: float | None = setting(None, "highest masking rate", low=0, high=1)
    prompt_mask: float | None = setting(
        None, "share of the prompt that is masked in scored states", low=0, high=1
    )
    tail: str | None = setting(
        None,
        "scored tokens: all, through the first end-of-text, all but later ones, or but all of them",
        choices=("all", "first", "one_end", "no_ends"),
    )
    cut_tail: bool | None = setting(
        None, "leave what follows the last of these tokens out of the scored states"
    )
    least_probability: float = setting(
        0.6, "rldf: also score masked tokens more probable than this", low=0, high=1
    )
    scored_policy: str | None = setting(
        None,
        "log-probs of the tempered and truncated sampler, or of the plain model",
        choices=("sampler", "model"),
    )

    # Advantages.
    baseline: str = setting(
        "mean", "subtracted from the reward", choices=("none", "mean", "leave_one_out")
    )
    scale_by_std: bool = setting(False, "divide advantages by the group's standard deviation")
    std_degrees: int = setting(
        1, "subtracted from the group's size in that deviation", choices=(0, 1)
    )
    std_epsilon: float = setting(1e-6, "added to that deviation", low=0)
    std_floor: float = setting(0.0, "least divisor in place of that deviation", low=0)
    softmax: str | None = setting(
        None,
        "advantage: softmax(A) - softmax(-A) over the group or all rollouts (wd1)",
        choices=("none", "group", "batch"),
    )

    softmax_negative: bool = setting(
        True, "false: softmax(A) alone, so that only good completions are learnt from"
    )

    # Objective.
    loss: str | None = setting(None, f"{', '.join(LOSSES)}, or your FILE.py:FUNCTION")
    level: str | None = setting(
        None,
        "what has one ratio: a token, a scored row, or a rollout",
        choices=("token", "row", "sequence"),
    )
    length_scale: bool | None = setting(
        None, "divide the log-likelihood of a row by its scored tokens, of a rollout by all tokens"
    )
    clip: str = setting(
        "ppo",
        "ppo: where it lowers the gain; dual: also bounds losses; always: whatever the sign; none",
        choices=("ppo", "dual", "always", "none"),
    )
    clip_low: float = setting(0.2, "ratio clipped below at 1 - clip_low", low=0)
    clip_high: float = setting(0.2, "ratio clipped above at 1 + clip_high", low=0)
    dual_clip: float = setting(
        3.0, "clip=dual: a negative advantage counts at most so often", low=1
    )
    kl_coefficient: float = setting(0.0, "weight of the KL", low=0)
    kl: str = setting(
        "k3_ratio",
        "estimate of the KL; k3_ratio is k3 times the ratio (published); exact sums over all ids, "
        "and stores the reference's distributions",
        choices=("k1", "k2", "k3", "k3_ratio", "exact"),
    )
    kl_target: str = setting(
        "reference",
        "policy that the KL is measured to: the frozen start, or the one that sampled",
        choices=("reference", "old"),
    )
    kl_sum: bool = setting(
        False, "sum the KL over the tokens of a row where the loss is their mean"
    )
    entropy_bonus: float = setting(0.0, "weight of the policy's entropy at scored tokens", low=0)
    rollout_correction: float | None = setting(
        None, "limit of importance weights for log-probs that differ from the sampler's", low=1
    )
    rollout_experts: str | None = setting(
        None,
        "experts that the rollout chose: compare logs how many routers choose otherwise in the "
        "update; replay also reuses them there",
        choices=("compare", "replay"),
    )
    normaliser: str | None = setting(
        None, "what the sum over scored tokens is divided by", choices=NORMALISERS
    )
    normaliser_constant: float | None = setting(
        None, "divisor of normaliser=constant; null: sampling.denoising_steps", low=1e-9
    )
    mean_over: str = setting(
        "all", "rollouts of the mean: all, or those with an advantage", choices=("all", "advantage")
    )
    bound: str = setting(
        "mix",
        "spg: upper bound of bad completions: eubo, elbo, or a mix of both",
        choices=("mix", "eubo", "elbo"),
    )
    bound_share: float = setting(0.5, "spg: share of the eubo in the mix", low=0, high=1)
    bound_power: float = setting(1.5, "spg: power of probabilities in the eubo", low=1)
    preference_beta: float = setting(0.2, "vrpo: scale of the log-ratio", low=0)

    @property
    def filled(self) -> "AlgorithmSettings":
        """Return the settings with the estimator's own values in place of null."""
        own: dict[str, Any] = ENTRIES.get(self.name, ENTRIES["agrpo"])
        missing = {key: value for key, value in own.items() if getattr(self, key) is None}
        return replace(self, **missing)

    @property
    def draws(self) -> int:
        """The drawn steps, or masks, per rollout; a run replaces `auto` before anything draws."""
        count = self.filled.mc_samples
        assert count != "auto"
        return count or 1

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs the log-probs of the frozen start."""
        is_preference = self.filled.loss == "preference"
        return is_preference or (self.kl_coefficient > 0 and self.kl_target == "reference")

    @property
    def is_own_code(self) -> bool:
        """Whether the estimator or the loss is a function in a file of the user's."""
        return is_file_name(self.name) or is_file_name(str(self.filled.loss))
