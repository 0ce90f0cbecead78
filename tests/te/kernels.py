"""Transformer Engine without a GPU: its kernels in plain torch, its own Python code.

Megatron-Core's Python code and ours are real too. This proves that the right kernels are called
with the right operands; it proves neither that a GPU's kernels agree with these, nor any speed. On
a GPU, the tests marked `gpu` run the real kernels.
"""

import sys
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import transformer_engine.pytorch  # noqa: F401  loads the extension
import transformer_engine_torch as extension
from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import _FromMXFP8Func

from tests.te import attention, dense, master, multi_tensor, quantize
from tests.te.rules import counted

STAND_INS = {
    attention: ("get_fused_attn_backend", "fused_attn_fwd", "fused_attn_bwd"),
    dense: (
        "generic_gemm",
        "te_general_grouped_gemm",
        "fused_multi_row_padding",
        "fused_multi_row_unpadding",
        "rmsnorm_fwd",
        "rmsnorm_bwd",
        "fused_rope_forward",
        "fused_rope_backward",
        "swiglu",
        "dswiglu",
    ),
    quantize: (
        "quantize",
        "split_quantize",
        "dequantize",
        "bgrad_quantize",
        "fp8_transpose",
        "swap_first_dims",
        "create_empty_quantized_tensor",
        "fused_amax_and_scale_update_after_reduction",
    ),
    multi_tensor: (
        "multi_tensor_adam",
        "multi_tensor_adam_param_remainder",
        "multi_tensor_scale",
        "multi_tensor_scale_tensor",
        "multi_tensor_l2norm",
    ),
    master: (
        "compute_amax",
        "fp8_block_scaling_compute_partial_amax",
        "fp8_block_scaling_partial_cast",
        "multi_tensor_compute_scale_and_scale_inv",
    ),
}
CUDNN = 91900  # the reported version: 9.19.0


MXFP8 = "fp8.recipe=mxfp8"
HOPPER, BLACKWELL = (9, 0), (10, 0)


def install(overrides: Sequence[str] = ()) -> None:
    """Make this process treat the CPU as a GPU; called once, mutates torch and more.

    Args:
        overrides: settings of the run: a Blackwell GPU if they select mxfp8, else a Hopper.

    Raises:
        RuntimeError: there is a GPU.
    """
    if torch.cuda.is_available():
        raise RuntimeError("a GPU is here: run `pytest -m gpu`, which needs no stand-ins")
    from agrpo_megatron.hardware import machine
    from agrpo_megatron.megatron import parallel as ranks
    from agrpo_megatron.megatron import platform

    platform._stand_in_for_cuda()
    torch._dynamo.config.disable = True  # it would compile for the GPU
    ranks.prepare_platform = lambda threads=None: torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    name, capability = "stand-in for a GPU", BLACKWELL if MXFP8 in overrides else HOPPER
    device = {"name": name, "multi_processor_count": 132, "total_memory": 80 << 30}
    properties = SimpleNamespace(**device, major=capability[0], minor=capability[1])
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_name = lambda device=None: name
    torch.autograd._engine_run_backward = _within_mode(torch.autograd._engine_run_backward)
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
    for module, names in STAND_INS.items():
        for name in names:
            _replace(getattr(extension, name), counted(getattr(module, name)))
    _FromMXFP8Func.forward = staticmethod(quantize.from_mxfp8)
    _replace(extension.get_cudnn_version, lambda: CUDNN)
    machine.look.cache_clear()


def _within_mode(run_backward):
    """Give a CPU also to kernels of a backward pass that request a GPU."""
    from agrpo_megatron.megatron.platform import _CpuForCuda

    def run(*args, **kwargs):
        with _CpuForCuda():
            return run_backward(*args, **kwargs)

    return run


def _replace(kernel: object, stand_in: object) -> None:
    """Install a stand-in in every module that imported the kernel."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(("transformer_engine", "megatron")):
            continue
        for attribute, value in list(vars(module).items()):
            if value is kernel:
                setattr(module, attribute, stand_in)
