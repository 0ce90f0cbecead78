"""The recorded cases of published estimators, in this project's terms; for check_estimators.py.

A method starts from its preset in examples/estimators, changed by the fields of the case.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import golden_rows as rows_of
import torch
from golden_rows import Recorded
from torch import Tensor

from agrpo_megatron.config.rules.algorithm import validate_algorithm
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings, Settings
from agrpo_megatron.estimators.advantages import advantages
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.types import Rollout, ScoredRows, Trajectory

PRESETS = Path(__file__).parents[1] / "examples" / "estimators"
TAILS = {0: "no_ends", 1: "one_end"}  # by the end-of-text tokens that are scored
# Fields of a case, and the settings that have their values.
FIELDS = {
    "group_size": ("group_size",),
    "num_iterations": ("updates_per_iteration",),
    **dict.fromkeys(("epsilon", "eps"), ("clip_low", "clip_high")),
    "epsilon_high": ("clip_high",),
    "dual_clip": ("dual_clip",),
    "beta": ("kl_coefficient",),
    "p_mask_prompt": ("prompt_mask",),
    **dict.fromkeys(("N", "K", "mask_num", "num_mc", "mc_num", "num_t"), ("mc_samples",)),
    "mask_times_per_sample": ("mc_samples",),
    "shrink": ("merge_steps",),
    "lower_p": ("mask_low",),
    "upper_p": ("mask_high",),
    "low_prob_threshold": ("least_probability",),
    "logp_estimation": ("bound",),
    "eubo_beta": ("bound_power",),
    "mix_weight": ("bound_share",),
}


type Rows = Callable[[Recorded, Rollout, DrawContext], ScoredRows]
type Values = Callable[[ScoredRows, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """How a method's record is read."""

    preset: str
    rows: Rows
    values: Values  # recorded values by scored token, each its own or its unit's, [N, C]
    extra: Callable[[Recorded], dict[str, Any]] = lambda _: {}  # settings besides `FIELDS`
    sees_padding: Callable[[Recorded], bool] = lambda _: True


@dataclass(frozen=True)
class Case:
    """A case that is ready to be computed."""

    recorded: Recorded
    algorithm: AlgorithmSettings
    sampling: SamplingSettings
    rollout: Rollout
    rows: ScoredRows
    values: Callable[[Tensor], Tensor]
    advantages: Tensor | None  # [B] that follow from the rewards

    @property
    def is_combined(self) -> bool:
        """Return whether values are recorded of units, not of their tokens."""
        return self.rows.coefficient is not None and self.algorithm.filled.loss != "sandwich"


def open_case(method: Method, recorded: Recorded, golden: dict[str, Any]) -> Case:
    """Build settings, rollout and rows of a recorded case.

    Raises:
        ValueError: no setting stands for what was recorded.
    """
    case = recorded.case
    preset = load(Settings, PRESETS / f"{method.preset}.yaml")
    own = preset.algorithm.filled
    known = {key: case[field] for field, keys in FIELDS.items() if field in case for key in keys}
    known = {key: value for key, value in known.items() if getattr(own, key) is not None}
    algorithm = replace(preset.algorithm, **{**known, **method.extra(recorded)})
    sampling = replace(
        preset.sampling,
        completion_length=recorded.width,
        block_length=case.get("block_length", 1),
        denoising_steps=case.get("steps", recorded.width),
        temperature=case.get("temperature", 1.0),
    )
    validate_algorithm(algorithm, sampling)
    gains = recorded.tensors.get("advantages")
    said = golden["tensors"].get("advantages", "")
    is_given = "input" in said and "output" not in said
    rollout = _rollout(recorded, method, algorithm, sampling, gains if is_given else None)
    context = DrawContext(algorithm, eos_id=golden["eos_token_id"], seed=0)
    rows = replace(method.rows(recorded, rollout, context), is_sampled=False)
    if gains is not None and gains.dim() > 1:  # of steps; all the same without rewards of steps
        gains = None if case["lambda1"] else gains[:, 0]
    return Case(
        recorded,
        algorithm,
        sampling,
        rollout,
        rows,
        values=lambda tensor: method.values(rows, tensor),
        advantages=None if is_given else gains,
    )


def _rollout(
    recorded: Recorded,
    method: Method,
    algorithm: AlgorithmSettings,
    sampling: SamplingSettings,
    gains: Tensor | None,
) -> Rollout:
    """Return the recorded completions; without `gains`, advantages follow from rewards."""
    tensors, count = recorded.tensors, recorded.completions
    tokens, prompts = tensors["completion_ids"], tensors["prompt_ids"]
    numbers = torch.arange(count, device=tokens.device)
    zeros = torch.zeros_like(tokens, dtype=torch.float32)
    is_seen = tensors.get("prompt_mask", torch.ones_like(prompts)).bool()
    if method.sees_padding(recorded):
        is_seen = torch.ones_like(is_seen)
    trajectory = Trajectory(
        prompts=tuple(row[seen] for row, seen in zip(prompts, is_seen, strict=True)),
        tokens=tokens,
        unmask_step=tensors.get("unmask_steps", torch.arange(recorded.width).expand_as(tokens)),
        logprobs=zeros,
        entropies=zeros,
        spreads=torch.ones_like(zeros),  # not recorded: no step is known to have no gradient
        support_ids=None,
        num_steps=torch.full_like(numbers, sampling.denoising_steps),
        rollout_ids=numbers,
        sampling=sampling,
    )
    # Pairs of answers have no rewards: the first of each is the better one.
    rewards = tensors.get("rewards", 1.0 - numbers % 2)
    gains = advantages(rewards, algorithm) if gains is None else gains
    return Rollout(trajectory, rewards, torch.zeros_like(rewards, dtype=torch.bool), gains)


def _dllm_rl(recorded: Recorded) -> dict[str, Any]:
    case = recorded.case
    if case["post_num"] not in TAILS:
        raise ValueError(f"post_num={case['post_num']}: algorithm.tail scores {list(TAILS)} ends")
    return {"tail": TAILS[case["post_num"]], "kl": "k3" if case["k3"] else "k1"}


def _cj_grpo(recorded: Recorded) -> dict[str, Any]:
    is_dare = recorded.case["variant"] == "dare"
    return {"clip": "dual", "scale_by_std": True} if is_dare else {}


def _wd1(recorded: Recorded) -> dict[str, Any]:
    is_both = recorded.case["variant"] != "positive_only"
    return {"softmax": "batch", "softmax_negative": is_both}


def _spg(recorded: Recorded) -> dict[str, Any]:
    is_random = recorded.case["forward_type"] == "random"
    return {"states": "random_count" if is_random else "blocks"}


def _gdpo(recorded: Recorded) -> dict[str, Any]:
    kind, _, nodes = recorded.case["logp_estimator"].partition("-")
    if kind == "mc":
        return {"states": "counts", "mc_samples": recorded.tensors["masked"].flatten(0, 1).shape[0]}
    return {"states": "quadrature", "mc_samples": int(nodes)}


def _vrpo(recorded: Recorded) -> dict[str, Any]:
    # The record lists which tokens are live; they do not follow from the end-of-text tokens.
    extra = {"group_size": 2, "tail": "all", "cut_tail": False}
    return {**extra, "kl_coefficient": 0.0, "preference_beta": recorded.case["beta"]}


def _bgpo(recorded: Recorded) -> dict[str, Any]:
    scale = recorded.case["dynamic_scale"]
    if scale is None:
        return {}
    return {"normaliser": "constant", "normaliser_constant": recorded.case["mc_num"] / scale}


def _just_grpo(recorded: Recorded) -> dict[str, Any]:
    return {"normaliser_constant": recorded.width / recorded.case["gain"]}


def _egspo(recorded: Recorded) -> dict[str, Any]:
    kl = "exact" if recorded.case["use_exact_kl"] else "k3"
    if recorded.case["aggregation"] == "mean":
        return {"length_scale": True, "normaliser": None, "normaliser_constant": None, "kl": kl}
    return {"normaliser_constant": recorded.width, "kl": kl}


def _rldf(recorded: Recorded) -> dict[str, Any]:
    return {"normaliser": "tokens" if recorded.case["loss_norm"] == "token" else "rows"}


METHODS = {
    "diffu_grpo": Method("diffu_grpo", rows_of.one_shot, rows_of.by_token),
    "wd1": Method("wd1", rows_of.one_shot, rows_of.by_token, _wd1),
    "coupled_grpo": Method("coupled_grpo", rows_of.coupled_and_full, rows_of.by_token),
    "spg": Method(
        "spg", rows_of.bounds, rows_of.by_draw, _spg, lambda r: not r.case["attention_mask"]
    ),
    "gdpo": Method("gdpo", rows_of.elbo, rows_of.per_token, _gdpo),
    "espo": Method("espo", rows_of.elbo, rows_of.per_token),
    "vrpo": Method("vrpo", rows_of.counts, rows_of.by_rollout, _vrpo, lambda _: False),
    "bgpo": Method("bgpo", rows_of.counts, rows_of.by_mask, _bgpo, lambda _: False),
    "cj_grpo": Method(
        "cj_grpo",
        rows_of.of_trajectory,
        rows_of.by_token,
        _cj_grpo,
        lambda recorded: recorded.case["variant"] != "dare",
    ),
    "d2_stepmerge": Method("step_merge", rows_of.of_trajectory, rows_of.by_token),
    "tracerl": Method("tracerl", rows_of.of_trajectory, rows_of.in_order, _dllm_rl),
    "unigrpo": Method("unigrpo", rows_of.listed, rows_of.in_order, _dllm_rl),
    "coupled_dllm_rl": Method("coupled_dllm_rl", rows_of.listed, rows_of.in_order, _dllm_rl),
    "justgrpo": Method("just_grpo", rows_of.of_trajectory, rows_of.by_token, _just_grpo),
    "egspo": Method("egspo", rows_of.of_steps, rows_of.by_step, _egspo),
    "rldf": Method("rldf", rows_of.of_masked_tails, rows_of.in_order, _rldf),
}
