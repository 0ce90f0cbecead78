"""Fused kernels that Megatron-Core found and that cannot run here."""

import torch
from megatron.core import optimizer, utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as mixed


def take_torch_optimizers() -> None:
    """Let Megatron-Core update weights and sum norms by torch alone; mutates its modules.

    It takes the fused kernels of whichever package it can import. Transformer Engine imports on a
    machine without a GPU too, where its kernels do not run.
    """
    lists = {
        "multi_tensor_applier": utils.local_multi_tensor_applier,
        "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
    }
    norms = {
        "l2_norm_impl": utils.local_multi_tensor_l2_norm,
        "multi_tensor_scale_tensor_impl": None,
    }
    flags = ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER")
    adam = {"Adam": torch.optim.AdamW, "SGD": torch.optim.SGD, "USING_PYTORCH_OPTIMIZER": True}
    for module, values in (
        (optimizer, adam),
        (distrib_optimizer, {"Adam": torch.optim.Adam, **dict.fromkeys(flags, False)}),
        (mixed, lists),
        (clip_grads, {**lists, **norms}),
    ):
        for name, value in values.items():
            setattr(module, name, value)
