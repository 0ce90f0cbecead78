"""The estimators and losses by name, with the settings that make each what its paper means."""

from typing import Any

_BASE = {
    "loss": "policy",
    "level": "token",
    "length_scale": False,
    "normaliser": "live_steps",
    "softmax": "none",
}
_STEPS = _BASE | {"scored_policy": "sampler"}
_MERGED = _STEPS | {"prompt_mask": 0.0, "tail": "first"}
_MASKS = _BASE | {"scored_policy": "model", "prompt_mask": 0.0, "tail": "all", "cut_tail": False}
_HIDDEN = _MASKS | {"states": "full", "prompt_mask": 0.15, "tail": "first"}

# Values in place of null. An estimator has no use for an optional setting that is missing here.
ENTRIES: dict[str, dict[str, Any]] = {
    # Denoising steps of the rollout itself.
    "agrpo": _STEPS | {"mc_samples": 8},
    "full_trajectory": _STEPS,
    "just_grpo": _STEPS | {"normaliser": "constant"},
    "block_just_grpo": _STEPS | {"normaliser": "constant", "merge_steps": 1, "tail": "all"},
    "cj_grpo": _STEPS | {"tail": "all", "normaliser": "same_step"},
    "step_merge": _MERGED | {"mc_samples": 8, "normaliser": "tokens"},
    "tracerl": _MERGED | {"merge_steps": 8, "normaliser": "rows"},
    "egspo": _STEPS | {"mc_samples": 8, "level": "row"},
    "rldf": _STEPS | {"mc_samples": 4, "tail": "first", "normaliser": "tokens", "loss": "filtered"},
    # Masks of the finished completion.
    "diffu_grpo": _HIDDEN | {"normaliser": "tokens"},
    "wd1": _HIDDEN | {"normaliser": "sum", "loss": "reinforce", "softmax": "group"},
    "unigrpo": _MASKS
    | {"states": "random", "mc_samples": 2, "mask_low": 0.1, "mask_high": 0.9}
    | {"tail": "first", "normaliser": "rows"},
    "coupled_grpo": _MASKS
    | {"states": "coupled", "mc_samples": 1, "mask_low": 0.2, "mask_high": 0.8}
    | {"tail": "first", "normaliser": "tokens"},
    "spg": _HIDDEN | {"states": "blocks", "mc_samples": 2, "loss": "sandwich"},
    "gdpo": _MASKS
    | {"states": "quadrature", "mc_samples": 3, "level": "sequence", "length_scale": True},
    "espo": _MASKS
    | {"states": "coupled_counts", "mc_samples": 2, "level": "sequence", "length_scale": True},
    "vrpo": _MASKS
    | {"states": "counts", "mc_samples": 8, "level": "sequence", "loss": "preference"},
    "bgpo": _MASKS
    | {"states": "counts", "mc_samples": 16, "level": "row", "length_scale": True}
    | {"loss": "linear_bound"},
}
ON_MASKS = tuple(name for name, own in ENTRIES.items() if "states" in own)

LOSSES = {
    "policy": "clipped ratio",
    "reinforce": "log-likelihood times advantage, without a ratio",
    "linear_bound": "1 + log-ratio in place of the ratio where the advantage is positive (bgpo)",
    "preference": "log-sigmoid of the best against the worst completion of a group (vrpo)",
    "sandwich": "lower bound of good, upper bound of bad completions (spg)",
    "filtered": "also other masked tokens that are probable enough (rldf)",
}
