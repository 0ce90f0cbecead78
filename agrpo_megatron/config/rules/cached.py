"""Rules of samplers that reuse the keys and values of their block's first step."""

from agrpo_megatron.config.own_code import is_file_name
from agrpo_megatron.config.settings import SamplingSettings, Settings

# Estimators that score states of the sampler, each in its open block.
ON_STATES = ("agrpo", "full_trajectory", "just_grpo", "egspo", "cj_grpo")


def validate_cached(settings: Settings) -> None:
    """Check that layout, kernels and estimator fit the sampler of a cached or approximate policy.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    sampling, algorithm, kernels = settings.sampling, settings.algorithm, settings.kernels
    if not sampling.is_cached:
        return
    said = f"sampling.policy={sampling.policy}"
    if settings.model.has_blocks:
        raise ValueError(
            f"{said} is for models in which all tokens see each other; with model.attention="
            f"{settings.model.attention} finished blocks never change, and rollout.cached reuses "
            "them exactly; use sampling.policy=exact"
        )
    layouts = (("parallel.", settings.parallel), ("rollout.parallel: ", settings.rollout_layout))
    shared = next((f"{key}context={p.context}" for key, p in layouts if p.context > 1), "")
    refused = {
        shared: (bool(shared), "shares a row among ranks", "context=1"),
        "kernels.cuda_graphs=true": (
            kernels.cuda_graphs,
            "replays forwards of whole rows",
            "kernels.cuda_graphs=false",
        ),
        "kernels.batch_invariant=true": (
            kernels.batch_invariant,
            "has no attention to cached keys",
            "kernels.batch_invariant=false",
        ),
        "rollout.cached=false": (
            settings.rollout.cached is False,
            "recomputes what that policy keeps",
            "rollout.cached=null",
        ),
        f"algorithm.rollout_experts={algorithm.rollout_experts}": (
            algorithm.rollout_experts is not None,
            "needs the experts of all tokens in every step",
            "algorithm.rollout_experts=null",
        ),
        f"algorithm.name={algorithm.name}": (
            algorithm.name not in ON_STATES and not is_file_name(algorithm.name),
            "scores states that the sampler did not have",
            f"one of {', '.join(ON_STATES)}",
        ),
    }
    for found, (is_refused, why, fix) in refused.items():
        if is_refused:
            raise ValueError(
                f"{found} {why}, so it is not for {said}; use {fix}, or sampling.policy=exact"
            )
    if sampling.policy == "approximate" and algorithm.rollout_correction is None:
        raise ValueError(
            f"{said} samples from another policy than the one that is trained, and needs the "
            "limit of the importance weights between them; use for example "
            "algorithm.rollout_correction=2, or sampling.policy=cached"
        )


def validate_module_policy(sampling: SamplingSettings) -> None:
    """Check that a sampler asks nothing of a torch module but its logits.

    Raises:
        ValueError: it reuses keys and values.
    """
    if sampling.is_cached:
        raise ValueError(
            f"sampling.policy={sampling.policy} reuses keys and values inside the model, which a "
            "torch module does not give out; use `agrpo train`, or policy='exact'"
        )
