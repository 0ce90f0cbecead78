"""The estimators and losses by name, with the settings that make each what its paper means."""

from typing import Any

_ON_STEPS = {"scored_policy": "sampler", "prompt_mask": 0.0, "tail": "all", "level": "token"}
_ON_MASKS = {"scored_policy": "model", "prompt_mask": 0.0, "tail": "all", "level": "token"}
_ALL = {"loss": "policy", "length_scale": False, "softmax": "none", "normaliser": "live_steps"}

# Values in place of null. An estimator has no use for an optional setting that is missing here.
ENTRIES: dict[str, dict[str, Any]] = {
    # Denoising steps of the rollout itself.
    "agrpo": _ALL | _ON_STEPS | {"mc_samples": 8},
    "full_trajectory": _ALL | _ON_STEPS,
    "just_grpo": _ALL | _ON_STEPS | {"normaliser": "constant"},
    "cj_grpo": _ALL | _ON_STEPS | {"normaliser": "same_step"},
    "step_merge": _ALL | _ON_STEPS | {"mc_samples": 8, "tail": "first", "normaliser": "tokens"},
    "tracerl": _ALL | _ON_STEPS | {"merge_steps": 8, "tail": "first", "normaliser": "rows"},
    "egspo": _ALL | _ON_STEPS | {"mc_samples": 8, "level": "row"},
    "rldf": _ALL
    | _ON_STEPS
    | {"mc_samples": 4, "tail": "first", "normaliser": "tokens", "loss": "filtered"},
    # Masks of the finished completion.
    "diffu_grpo": _ALL
    | _ON_MASKS
    | {"states": "full", "prompt_mask": 0.15, "tail": "first", "normaliser": "tokens"},
    "wd1": _ALL
    | _ON_MASKS
    | {"states": "full", "prompt_mask": 0.15, "tail": "first", "normaliser": "sum"}
    | {"loss": "reinforce", "softmax": "group"},
    "unigrpo": _ALL
    | _ON_MASKS
    | {"states": "random", "mc_samples": 2, "mask_low": 0.1, "mask_high": 0.9}
    | {"tail": "first", "normaliser": "rows"},
    "coupled_grpo": _ALL
    | _ON_MASKS
    | {"states": "coupled", "mc_samples": 1, "mask_low": 0.2, "mask_high": 0.8}
    | {"tail": "first", "normaliser": "tokens"},
    "spg": _ALL
    | _ON_MASKS
    | {"states": "blocks", "mc_samples": 2, "prompt_mask": 0.15, "tail": "first"}
    | {"loss": "sandwich", "normaliser": "tokens"},
    "gdpo": _ALL
    | _ON_MASKS
    | {"states": "quadrature", "mc_samples": 3, "level": "sequence", "length_scale": True},
    "espo": _ALL
    | _ON_MASKS
    | {"states": "coupled_counts", "mc_samples": 2, "level": "sequence", "length_scale": True},
    "vrpo": _ALL
    | _ON_MASKS
    | {"states": "counts", "mc_samples": 8, "level": "sequence", "loss": "preference"},
    "bgpo": _ALL
    | _ON_MASKS
    | {"states": "counts", "mc_samples": 16, "level": "row", "length_scale": True}
    | {"loss": "linear_bound"},
}
ON_MASKS = tuple(name for name, own in ENTRIES.items() if "states" in own)

# name: the objective
LOSSES = {
    "policy": "clipped ratio",
    "reinforce": "log-likelihood times advantage, without a ratio",
    "linear_bound": "1 + log-ratio in place of the ratio where the advantage is positive (bgpo)",
    "preference": "log-sigmoid of the best against the worst completion of a group (vrpo)",
    "sandwich": "lower bound of good, upper bound of bad completions (spg)",
    "filtered": "also other masked tokens that are probable enough (rldf)",
}
