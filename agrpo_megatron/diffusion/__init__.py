"""Pure functions of tensors: the sampler, the drawn steps, log-probabilities, losses, estimators.

No Megatron and no globals; a process group or a noise key is an argument.
"""
