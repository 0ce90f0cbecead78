"""Everything that touches Megatron-Core: platform, ranks, layer spec, model, optimizer.

Megatron-Core decorates its fused kernels with `torch.compile`, which imports the compiler: a third
of the seconds that a start takes. Without a GPU nothing calls them, so they stay undecorated.
"""

import torch

if not torch.cuda.is_available():
    _compile = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        import megatron.core as _  # noqa: F401
    finally:
        torch.compile = _compile
