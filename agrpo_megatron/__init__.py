"""Reinforcement learning for masked diffusion language models on Megatron-Core."""

import logging
import warnings

__version__ = "0.1.0"

# At import Megatron lists the optional packages it did not find, which `agrpo doctor` says
# better, and at every checkpoint it and torch announce what a later release will drop.
for _module in (r"megatron\.core", r"torch\.distributed\.checkpoint"):
    warnings.filterwarnings("ignore", module=_module)
for _message in ("Please use DTensor", "The .grad attribute of a Tensor that is not a leaf"):
    warnings.filterwarnings("ignore", message=_message)
for _logger in (
    "torch.utils.cpp_extension",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed.distributed_data_parallel",
):
    logging.getLogger(_logger).setLevel(logging.ERROR)
