"""Rules of the policy gradient: what an estimator or a loss has no use for is refused."""

import ast
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from agrpo_megatron.config.own_code import is_file_name, split_name
from agrpo_megatron.config.rules.scoring import validate_scoring
from agrpo_megatron.config.settings.algorithm import AlgorithmSettings
from agrpo_megatron.config.settings.estimators import ENTRIES, LOSSES, ON_MASKS
from agrpo_megatron.config.settings.sampling import SamplingSettings
from agrpo_megatron.config.values import did_you_mean, text

_DRAWN = ("proposal", "step_sampler", "allocation", "uniform_mix", "enumerate_short")
_ON_STEPS = ("agrpo", "full_trajectory", "just_grpo", "egspo")
_WITH_LEVELS = ("agrpo", "full_trajectory", "just_grpo", "egspo", *ON_MASKS)
_CLIPPED = ("policy", "linear_bound", "filtered")
_OF_STEPS = ("live_steps", "all_steps", "tokens", "constant")

# setting: the estimators that use it; other settings are used by all, or by those whose entry
# has a value for them.
OF_ESTIMATORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_DRAWN, ("agrpo",)),
    "live_steps": (*_ON_STEPS, "cj_grpo"),
    "rollout_correction": (*_ON_STEPS, "cj_grpo"),
    "scoring": ("agrpo", "full_trajectory", "cj_grpo"),
    "rollout_experts": (*_ON_STEPS, "cj_grpo", "step_merge", "tracerl", "rldf"),
}
# setting: the losses that use it
OF_LOSSES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("clip", "clip_low", "clip_high", "dual_clip"), _CLIPPED),
    **dict.fromkeys(("kl_coefficient", "kl", "kl_target"), (*_CLIPPED, "reinforce")),
    "kl_sum": ("policy", "linear_bound", "reinforce"),
    "mean_over": ("policy", "linear_bound", "reinforce"),
    **dict.fromkeys(("bound", "bound_share", "bound_power"), ("sandwich",)),
    "preference_beta": ("preference",),
    "least_probability": ("filtered",),
    **dict.fromkeys(("baseline", "scale_by_std", "softmax"), tuple(set(LOSSES) - {"preference"})),
}


def validate_algorithm(algorithm: AlgorithmSettings, sampling: SamplingSettings) -> None:
    """Check that the estimator and the loss exist, and use every setting that was changed.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    _check_name("name", algorithm.name, ENTRIES)
    if algorithm.loss is not None:
        _check_name("loss", algorithm.loss, LOSSES)
    _check_auto(algorithm)
    filled, defaults = algorithm.filled, AlgorithmSettings(name=algorithm.name).filled
    if not is_file_name(algorithm.name):
        _check_used(algorithm, OF_ESTIMATORS, by="name", who=algorithm.name)
        _check_entry(algorithm)
    if not is_file_name(str(filled.loss)):
        _check_used(algorithm, OF_LOSSES, by="loss", who=str(filled.loss))
    if not is_file_name(algorithm.name):
        _check_pair(filled)
        _check_level(filled, defaults)
        _check_normaliser(filled, defaults)
        _check_joined(filled)
    _check_exact_kl(filled, sampling)
    if filled.step_sampler in ("distinct", "blocks") and not filled.enumerate_short:
        raise ValueError(
            "algorithm.enumerate_short=false has no meaning under algorithm.step_sampler="
            f"{filled.step_sampler}, which takes every step where draws suffice; use true, or "
            "algorithm.step_sampler=systematic"
        )
    _check_details(filled)
    low, high = filled.mask_low, filled.mask_high
    if low is not None and high is not None and low > high:
        raise ValueError(
            f"algorithm.mask_low={low:g} is above algorithm.mask_high={high:g}; lower it"
        )
    _check_sampling(filled, sampling)
    validate_scoring(filled, sampling)


def _check_name(key: str, name: str, known: Collection[str]) -> None:
    """Check an entry's name, or that a file has the function that is named."""
    said = f"algorithm.{key}={name}"
    if not is_file_name(name):
        if name not in known:
            raise ValueError(
                f"{said} must be one of {', '.join(known)}, or your FILE.py:FUNCTION"
                f"{did_you_mean(name, known)}"
            )
        return
    path, wanted = split_name(name)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{said}: {path} cannot be read: {error}; give a Python file") from None
    own = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if wanted not in own:
        raise ValueError(
            f"{said}: {path} has no function {wanted or '(none was named)'}; name one as "
            f"{path}:FUNCTION; it has {', '.join(own) or 'none'}"
        )


def _check_pair(filled: AlgorithmSettings) -> None:
    """Refuse a loss that needs the rows of another estimator."""
    loss, name = str(filled.loss), filled.name
    if name == "rldf" and not is_file_name(loss) and loss != "filtered":
        raise ValueError(f"algorithm.loss={loss} is not for algorithm.name=rldf; use filtered")
    for_masks = ("preference", "sandwich")
    users = ON_MASKS if loss in for_masks else ("rldf",) if loss == "filtered" else (name,)
    if name not in users:
        raise ValueError(
            f"algorithm.loss={loss} needs the rows of algorithm.name={' or '.join(users)}, and "
            f"algorithm.name={name}; use {AlgorithmSettings(name=name).filled.loss}"
        )


def _check_used(
    algorithm: AlgorithmSettings, users: dict[str, tuple[str, ...]], *, by: str, who: str
) -> None:
    """Refuse a changed setting that the estimator (`by=name`) or the loss has no use for."""
    defaults = {field.name: field.default for field in fields(AlgorithmSettings)}
    own = ENTRIES.get(algorithm.name, {})
    for key, known in users.items():
        value = getattr(algorithm, key)
        if value not in (defaults[key], own.get(key)) and who not in known:
            raise ValueError(
                f"algorithm.{key}={text(value)} has no meaning under algorithm.{by}={who}; use "
                f"{text(defaults[key])}, or algorithm.{by}={' or '.join(sorted(known))}"
            )


def _check_entry(algorithm: AlgorithmSettings) -> None:
    """Refuse an optional setting that no value of the estimator's entry stands for."""
    own = ENTRIES[algorithm.name]
    optional = dict.fromkeys(key for entry in ENTRIES.values() for key in entry)
    for key in optional:
        value: Any = getattr(algorithm, key)
        if value is not None and key not in own:
            users = [name for name, entry in ENTRIES.items() if key in entry]
            raise ValueError(
                f"algorithm.{key}={text(value)} has no meaning under algorithm.name="
                f"{algorithm.name}; use null, or algorithm.name={' or '.join(users)}"
            )


def _check_level(filled: AlgorithmSettings, defaults: AlgorithmSettings) -> None:
    is_fixed = filled.loss in ("preference", "sandwich", "filtered")
    if filled.level != defaults.level and (filled.name not in _WITH_LEVELS or is_fixed):
        who = f"algorithm.loss={filled.loss}" if is_fixed else f"algorithm.name={filled.name}"
        raise ValueError(f"algorithm.level={filled.level} is not for {who}; use {defaults.level}")
    if filled.level == "token" and filled.length_scale:
        raise ValueError(
            "algorithm.length_scale=true scales the log-likelihood of a row or sequence, and "
            "algorithm.level=token; use false, or algorithm.level=sequence"
        )
    if filled.level != "token" and filled.kl_sum:
        raise ValueError(
            f"algorithm.kl_sum=true is for algorithm.level=token, not for {filled.level}; use false"
        )


def _check_normaliser(filled: AlgorithmSettings, defaults: AlgorithmSettings) -> None:
    said = f"algorithm.normaliser={filled.normaliser}"
    if filled.normaliser != defaults.normaliser:
        if filled.level == "sequence" or filled.loss in ("preference", "sandwich"):
            raise ValueError(
                f"{said} is of tokens or rows, and here each rollout counts once; use null"
            )
        if filled.name in _ON_STEPS and filled.normaliser not in _OF_STEPS:
            raise ValueError(
                f"{said} is not for algorithm.name={filled.name}; use {', '.join(_OF_STEPS)}"
            )
        if filled.loss == "filtered" and filled.normaliser not in ("tokens", "rows"):
            raise ValueError(f"{said} is not for algorithm.loss=filtered; use tokens or rows")
    if filled.normaliser_constant is not None and filled.normaliser != "constant":
        raise ValueError(
            f"algorithm.normaliser_constant={filled.normaliser_constant:g} is for "
            f"algorithm.normaliser=constant, not for {filled.normaliser}; use null"
        )


def _check_exact_kl(filled: AlgorithmSettings, sampling: SamplingSettings) -> None:
    """Refuse an exact KL where distributions are not known or not those of the scored policy."""
    if filled.kl != "exact":
        return
    if filled.kl_target == "old" or filled.loss == "filtered":
        who = "kl_target=old" if filled.kl_target == "old" else "loss=filtered"
        raise ValueError(
            f"algorithm.kl=exact needs the distributions of a reference, and algorithm.{who} "
            "has only log-probs; use algorithm.kl=k3"
        )
    is_cut = sampling.top_k is not None or sampling.top_p < 1
    if filled.scored_policy == "sampler" and is_cut:
        raise ValueError(
            f"algorithm.kl=exact is over all ids, and sampling.top_k={text(sampling.top_k)} "
            f"sampling.top_p={sampling.top_p:g} keep some; use algorithm.kl=k3, or "
            "algorithm.scored_policy=model"
        )


def _check_auto(algorithm: AlgorithmSettings) -> None:
    """Refuse to measure the number of draws where there is nothing to measure."""
    if algorithm.mc_samples != "auto":
        return
    if algorithm.name != "agrpo":
        raise ValueError(
            "algorithm.mc_samples=auto measures the drawn steps of algorithm.name=agrpo, and "
            f"algorithm.name={algorithm.name}; use null"
        )
    if algorithm.step_sampler == "blocks":
        raise ValueError(
            "algorithm.mc_samples=auto measures numbers of drawn steps, and "
            "algorithm.step_sampler=blocks draws whole blocks; use a number of draws, or distinct"
        )
    if algorithm.prompts_per_iteration < 2:
        raise ValueError(
            "algorithm.mc_samples=auto compares two halves of an iteration's problems, and "
            "algorithm.prompts_per_iteration=1; use at least 2, or a number of draws"
        )


def _check_details(filled: AlgorithmSettings) -> None:
    """Refuse details of an advantage, of a tail, or of a measurement, that is not used."""
    defaults = {field.name: field.default for field in fields(AlgorithmSettings)}
    users = {
        **dict.fromkeys(("std_degrees", "std_epsilon", "std_floor"), "scale_by_std=true"),
        "softmax_negative": "softmax=group",
        "auto_share": "mc_samples=auto",
    }
    is_used = {
        "scale_by_std=true": filled.scale_by_std,
        "softmax=group": filled.softmax != "none",
        "mc_samples=auto": filled.mc_samples == "auto",
    }
    for key, user in users.items():
        value = getattr(filled, key)
        if value != defaults[key] and not is_used[user]:
            raise ValueError(
                f"algorithm.{key}={text(value)} has no meaning without algorithm.{user}; use "
                f"{text(defaults[key])}"
            )
    if filled.cut_tail and filled.tail == "all":
        raise ValueError(
            "algorithm.cut_tail=true leaves out what algorithm.tail does not score, and "
            "algorithm.tail=all; use algorithm.tail=first"
        )


def _check_joined(filled: AlgorithmSettings) -> None:
    """Refuse other means where a token's log-probs are joined over rows: each counts once."""
    if filled.states != "coupled_and_full" or filled.level != "token":
        return
    for key, only in (("normaliser", "tokens"), ("mean_over", "all"), ("kl_sum", False)):
        if (value := getattr(filled, key)) != only:
            raise ValueError(
                f"algorithm.{key}={text(value)} has no meaning under algorithm.states="
                f"coupled_and_full, where each token counts once; use {text(only)}"
            )


def _check_sampling(filled: AlgorithmSettings, sampling: SamplingSettings) -> None:
    """Check what an estimator needs of the sampler."""
    steps, length = sampling.denoising_steps, sampling.completion_length
    if filled.name == "just_grpo":
        is_leftmost = sampling.unmasking == "leftmost" or sampling.block_length == 1
        if not is_leftmost or steps != length or sampling.threshold is not None:
            raise ValueError(
                "algorithm.name=just_grpo scores left-to-right decoding, one token a step; use "
                f"sampling.unmasking=leftmost sampling.denoising_steps={length} "
                "sampling.threshold=null"
            )
    if filled.step_sampler == "blocks" and sampling.most_blocks == 1:
        raise ValueError(
            "algorithm.step_sampler=blocks draws whole blocks, and sampling.block_length="
            f"{sampling.block_length} makes one of the completion, with all of its steps; use "
            "algorithm.step_sampler=distinct, or algorithm.name=full_trajectory"
        )
    if filled.name == "step_merge" and filled.draws > steps:
        raise ValueError(
            f"algorithm.mc_samples={filled.mc_samples} segments need as many denoising steps, and "
            f"sampling.denoising_steps={steps}; use at most {steps}"
        )
    masked = filled.scored_policy == "model"
    if masked and filled.rollout_correction is not None:
        raise ValueError(
            f"algorithm.rollout_correction={filled.rollout_correction:g} compares log-probs with "
            "the sampler's, and algorithm.scored_policy=model scores others; use null, or "
            "algorithm.scored_policy=sampler"
        )
