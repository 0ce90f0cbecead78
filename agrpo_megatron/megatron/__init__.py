"""Everything that touches Megatron-Core: platform, ranks, layer spec, model, optimizer.

Megatron-Core imports what a start here has no use for, a third of its seconds: `torch.compile`
decorates fused kernels and so imports the compiler, though without a GPU nothing calls them; and
wandb serves logs of Megatron's own. Both are out of its reach while it is imported.
"""

import sys

import torch

_compile = torch.compile
if not torch.cuda.is_available():
    torch.compile = lambda function: function  # type: ignore[assignment]
sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # its import then fails
try:
    import megatron.core as _  # noqa: F401
finally:
    torch.compile = _compile
    if sys.modules["wandb"] is None:
        del sys.modules["wandb"]
