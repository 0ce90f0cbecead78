"""What a cached or approximate sampler is refused, key by key."""

import pytest

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion import SamplingSettings
from agrpo_megatron.diffusion.modules.sampling import validate_module_policy

CACHED = ["sampling.policy=cached"]
BLOCKS = ["model.attention=block_causal", "model.block_length=32"]
EXPERTS = ["model.family=llada_moe", "model.moe.experts=4", "model.moe.ffn_hidden_size=64"]

REFUSED = {
    "context": (["parallel=cp2"], "parallel.context=2 shares a row", "context=1"),
    "context of rollouts": (
        ["rollout.parallel=cp2"],
        "rollout.parallel: context=2 shares a row",
        "context=1",
    ),
    "graphs": (
        ["kernels.cuda_graphs=true", "precision=bf16"],
        "kernels.cuda_graphs=true replays forwards",
        "kernels.cuda_graphs=false",
    ),
    "batch invariance": (
        ["kernels.batch_invariant=true", "precision=bf16", "kernels.layer_spec=te"],
        "kernels.batch_invariant=true has no attention",
        "kernels.batch_invariant=false",
    ),
    "no cache": (["rollout.cached=false"], "rollout.cached=false", "rollout.cached=null"),
    "experts of the rollout": (
        [*EXPERTS, "algorithm.rollout_experts=replay"],
        "algorithm.rollout_experts=replay needs the experts",
        "algorithm.rollout_experts=null",
    ),
    "masks": (
        ["algorithm.name=espo"],
        "algorithm.name=espo scores states that the sampler did not have",
        "one of agrpo, full_trajectory, just_grpo, egspo, cj_grpo",
    ),
}


def _refusal(*overrides, world_size=1):
    with pytest.raises(ValueError, match="sampling.policy") as error:
        validate(load(Settings, None, [*overrides]), world_size)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_cached_policy_lacks_is_refused_with_its_key_and_a_fix(name):
    overrides, said, fix = REFUSED[name]
    message = _refusal(*CACHED, *overrides, world_size=2)
    assert message.startswith(said)
    assert message.endswith(f"not for sampling.policy=cached; use {fix}, or sampling.policy=exact")


def test_a_block_model_has_an_exact_cache():
    message = _refusal(*CACHED, *BLOCKS)
    assert message.startswith("sampling.policy=cached is for models in which all tokens see each")
    assert message.endswith("use sampling.policy=exact")


def test_an_approximate_policy_needs_importance_weights():
    message = _refusal("sampling.policy=approximate")
    assert message.endswith("algorithm.rollout_correction=2, or sampling.policy=cached")
    settings = load(
        Settings, None, ["sampling.policy=approximate", "algorithm.rollout_correction=2"]
    )
    validate(settings)
    assert settings.evaluation_sampling.policy == "exact", "what is trained is evaluated"


def test_a_cached_policy_is_evaluated_as_it_is_trained_and_may_have_a_cache_and_its_kernel():
    own = ["rollout.cache_memory=1", "kernels.block_attention=sdpa"]
    settings = load(Settings, None, [*CACHED, *own])
    validate(settings)
    assert settings.evaluation_sampling.policy == "cached"
    for key in own:
        with pytest.raises(ValueError, match="a cached policy"):
            validate(load(Settings, None, [key]))


def test_a_torch_module_has_no_keys_to_reuse():
    with pytest.raises(ValueError, match="policy=cached reuses keys and values inside the model"):
        validate_module_policy(SamplingSettings(policy="cached"))
