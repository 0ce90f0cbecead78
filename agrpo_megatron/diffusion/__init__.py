"""Pure functions of tensors: the sampler, its draws, log-probabilities, packed rows.

No Megatron and no globals; a process group or a noise key is an argument.
"""
