"""Batch-invariant kernels of Megatron, around single methods of a model."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor


def batch_invariant[Model: LanguageModule, **Inputs](
    method: Callable[Concatenate[Model, Inputs], Tensor],
) -> Callable[Concatenate[Model, Inputs], Tensor]:
    """Run a method with Megatron's batch-invariant kernels, if the model is to use them.

    They replace torch's for the whole process, so they are in place only within a forward pass.
    Elsewhere they would be wrong: they refuse float64, and a mean over all dimensions is the sum.
    A backward pass needs none, also where it recomputes a layer.
    """

    @wraps(method)
    def _run(self: Model, *args: Inputs.args, **kwargs: Inputs.kwargs) -> Tensor:
        if not self.config.batch_invariant_mode:
            return method(self, *args, **kwargs)
        from megatron.core.transformer.custom_layers import batch_invariant_kernels  # loads Triton

        with batch_invariant_kernels.set_batch_invariant_mode():
            return method(self, *args, **kwargs)

    return _run
