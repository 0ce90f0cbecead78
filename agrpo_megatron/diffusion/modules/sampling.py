"""Sample with settings that code has made: they are checked as those of a file."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agrpo_megatron.config.rules import validate_sampling
from agrpo_megatron.config.rules.blocks import validate_block_sampling
from agrpo_megatron.config.rules.cached import validate_module_policy
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
        ValueError: a setting has no such value, does not divide another, or is not honoured; or
            the ids of a prompt or of the rollouts cannot be.
        SamplingStopped: `hooks.should_stop` returned true.
    """
    sampling = rebuilt(sampling, "sampling")
    validate_sampling(sampling, "sampling")
    check_context(context, sampling)
    if sampling.end_at_stop and not context.stop_ids:
        raise ValueError(
            "sampling.end_at_stop=true ends a row at a stop token, and the context has none; give "
            "module_context(..., stop_ids=...)"
        )
    is_ending = sampling.end_at_stop or (hooks or SamplerHooks()).on_step != SamplerHooks().on_step
    if is_ending and context.eos_id is None:
        key = "sampling.end_at_stop=true" if sampling.end_at_stop else "SamplerHooks.on_step"
        raise ValueError(
            f"{key} ends rows, whose remaining tokens become end-of-text, and the context has no "
            "such token; give module_context(..., eos_id=...)"
        )
    _check(prompts, rollout_ids, context)
    return sampler.sample(prompts, rollout_ids, context=context, sampling=sampling, hooks=hooks)


def check_context(context: SamplerContext, sampling: SamplingSettings) -> None:
    """Check that settings are those of a context: its blocks, and whether it draws the mask token.

    Raises:
        ValueError: they are not, with the fix.
    """
    validate_block_sampling(sampling, context.model, "sampling")
    validate_module_policy(sampling)
    is_forbidden = context.mask_id in context.vocab.forbidden
    if is_forbidden and not sampling.forbid_mask_token:
        raise ValueError(
            "sampling.forbid_mask_token=false: the context forbids the mask token; make it by "
            "module_context(..., may_draw_mask=True)"
        )
    if sampling.forbid_mask_token and not is_forbidden:
        raise ValueError(
            "sampling.forbid_mask_token=true: the context may draw the mask token; use "
            "SamplingSettings(forbid_mask_token=False), or module_context without may_draw_mask"
        )


def _check(prompts: Sequence[Tensor], rollout_ids: Tensor, context: SamplerContext) -> None:
    """Check the ids of prompts and rollouts: a wrong one would fail deep in the module, or not."""
    count, size = len(prompts), context.vocab.size
    is_vector = rollout_ids.shape == (count,) and rollout_ids.dtype == torch.int64
    if not is_vector or len(set(rollout_ids.tolist())) != count:
        raise ValueError(
            f"rollout_ids={rollout_ids}: give a tensor [{count}], int64, of one id for each of "
            f"{count} prompts, and none twice: they seed the noise"
        )
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, Tensor) or prompt.ndim != 1 or prompt.dtype != torch.int64:
            raise ValueError(
                f"prompts[{number}]={prompt!r:.80}: give a tensor of ids [length], int64"
            )
        if len(prompt) and not 0 <= int(prompt.min()) <= int(prompt.max()) < size:
            raise ValueError(f"prompts[{number}]={prompt!r:.80}: its ids must be below {size}")
