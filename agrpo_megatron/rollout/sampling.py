"""Completions of prompts that are token ids: the sampler on a network of Megatron."""

from collections.abc import Sequence

from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings, Settings
from agrpo_megatron.diffusion.sampler import SamplerContext, SamplerHooks, sample
from agrpo_megatron.megatron.forward import RolloutForward
from agrpo_megatron.megatron.layers.cache import make_store
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.pipeline import make_forward
from agrpo_megatron.megatron.platform import plain_torch
from agrpo_megatron.rollout.experts import Recorder
from agrpo_megatron.types import Trajectory


def sample_ids(
    settings: Settings,
    network: Network,
    prompts: Sequence[Tensor],
    rollout_ids: Tensor,
    *,
    sampling: SamplingSettings,
    stop_ids: Sequence[int] = (),
    hooks: SamplerHooks | None = None,
    recorder: Recorder | None = None,
) -> tuple[Trajectory, RolloutForward]:
    """Sample one completion per prompt; also return the forward, which counts tokens and slots.

    Called by every rank of a replica with the same prompts.

    Args:
        stop_ids: tokens that end a text, for `sampling.end_at_stop`.
        recorder: keeps the experts of the tokens; None: nothing does.
    """
    model = settings.model
    assert model.mask_token_id is not None
    forward = make_forward(network, settings.rollout, sampling=sampling)
    forward.record = recorder
    context = SamplerContext(
        forward=forward,
        vocab=network.vocab,
        mask_id=model.mask_token_id,
        eos_id=model.eos_token_id,
        seed=settings.run.seed,
        token_budget=settings.train.token_budget,
        model=model,
        stop_ids=stop_ids,
        most_rows=settings.rollout.rows,
        store=make_store(settings, network.ranks, prompts, sampling=sampling),
    )
    # Megatron's schedule of pipeline stages names CUDA devices, too.
    names_cuda = network.ranks.pipeline.size > 1 or network.chunks[0].names_cuda
    with plain_torch(names_cuda=names_cuda):
        sampled = sample(prompts, rollout_ids, context=context, sampling=sampling, hooks=hooks)
    return sampled, forward
