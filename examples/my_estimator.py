"""An estimator and a loss of your own, in one file:

    agrpo train examples/tiny.yaml algorithm.mc_samples=null \
        algorithm.name=examples/my_estimator.py:suffixes \
        algorithm.loss=examples/my_estimator.py:soft_clip

An estimator turns graded completions into states, targets and weights. This one hides the last
part of every completion, from a random place on, and scores all hidden tokens. A loss turns scored
log-probs into a number. Any loss is right under every layout: Megatron's ranks hold the tokens, but
it receives all of them at once.
"""

import torch

from agrpo_megatron.diffusion import noise
from agrpo_megatron.types import LossOutputs, ScoredRows


def suffixes(rollout, context):
    """Score the hidden suffix of each completion; `context` has the settings and the seed."""
    trajectory = rollout.trajectory
    places = torch.arange(trajectory.tokens.shape[1], device=trajectory.tokens.device)
    # Counted noise, not a generator: every rank must draw the same.
    start = noise.uniform(noise.noise_key(context.seed, noise.STATES, trajectory.rollout_ids))
    hidden = places >= (start * len(places)).long()[:, None]
    return ScoredRows(
        rollout=torch.arange(len(hidden), device=hidden.device),
        hidden=hidden,
        scored=hidden,
        weight=hidden / hidden.sum(1, keepdim=True),  # a mean over each completion
        is_sampled=False,  # the sampler did not visit these states
    )


def soft_clip(inputs, algorithm):
    """Damp a token's gain smoothly in its distance from the policy that sampled."""
    gap = inputs.logprobs - inputs.old_logprobs
    gain = algorithm.clip_high * torch.tanh(gap / algorithm.clip_high) * inputs.advantages
    return LossOutputs(-(gain * inputs.weights).sum(), {})
