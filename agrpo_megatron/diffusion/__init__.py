"""Pure functions of tensors: the sampler, its draws, log-probabilities, packed rows.

No Megatron and no globals; a process group or a noise key is an argument. The names below are for
programs of your own, with any torch module: docs/library.md. Importing them loads torch only.
"""

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion.batches import timestep_batch
from agrpo_megatron.diffusion.draw import draw_tokens
from agrpo_megatron.diffusion.logprobs import Vocabulary, policy_logits, token_logprobs
from agrpo_megatron.diffusion.modules.forward import ModuleForward, module_context
from agrpo_megatron.diffusion.modules.sampling import sample
from agrpo_megatron.diffusion.sampler import SamplerContext, SamplerHooks
from agrpo_megatron.trajectories import state_tokens
from agrpo_megatron.types import Trajectory

__all__ = [
    "ModuleForward",
    "SamplerContext",
    "SamplerHooks",
    "SamplingSettings",
    "Trajectory",
    "Vocabulary",
    "draw_tokens",
    "module_context",
    "policy_logits",
    "sample",
    "state_tokens",
    "timestep_batch",
    "token_logprobs",
]
