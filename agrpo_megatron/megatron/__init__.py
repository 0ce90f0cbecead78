"""Everything that touches Megatron-Core: platform, ranks, layer spec, model, optimizer."""

import logging
import warnings

# Megatron says at import which optional packages it did not find; `agrpo doctor` says it better.
warnings.filterwarnings("ignore", module=r"megatron\.core")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
