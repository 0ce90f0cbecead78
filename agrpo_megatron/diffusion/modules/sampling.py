"""Sample with settings that code has made: they are checked as those of a file."""

from collections.abc import Sequence

from torch import Tensor

from agrpo_megatron.config.rules import validate_sampling
from agrpo_megatron.config.schema import rebuilt
from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion import sampler
from agrpo_megatron.diffusion.sampler import SamplerContext, SamplerHooks
from agrpo_megatron.types import Trajectory


def sample(
    prompts: Sequence[Tensor],
    rollout_ids: Tensor,
    *,
    context: SamplerContext,
    sampling: SamplingSettings,
    hooks: SamplerHooks | None = None,
) -> Trajectory:
    """Sample one completion per prompt.

    A completion depends only on its prompt, its rollout id, the seed and the weights.

    Args:
        prompts: R tensors of token ids, int64.
        rollout_ids: [R] int64, unique within a run.

    Raises:
        ValueError: a setting has no such value, does not divide another, or is not honoured.
        SamplingStopped: `hooks.should_stop` returned true.
    """
    sampling = rebuilt(sampling, "sampling")
    validate_sampling(sampling, "sampling")
    if context.mask_id in context.vocab.forbidden and not sampling.forbid_mask_token:
        raise ValueError(
            "sampling.forbid_mask_token=false: the context forbids the mask token; make it by "
            "module_context(..., may_draw_mask=True)"
        )
    return sampler.sample(prompts, rollout_ids, context=context, sampling=sampling, hooks=hooks)
