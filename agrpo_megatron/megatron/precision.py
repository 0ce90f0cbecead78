"""Translate precision and kernels into values of Megatron's TransformerConfig."""

from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend

from agrpo_megatron.config.settings import Fp8Settings, KernelSettings
from agrpo_megatron.hardware.kernels import Kernels

# FP8 products need a multiple of this many tokens: blockwise scales cover 1 x 128 values, other
# recipes need 16 or 32.
FP8_TOKENS = 128


def token_multiple(precision: str) -> int:
    """Return the multiple that the packed tokens of a rank are padded to."""
    return FP8_TOKENS if precision == "fp8" else 1


def kernel_values(
    precision: str, fp8: Fp8Settings, switches: KernelSettings, kernels: Kernels
) -> dict[str, Any]:
    """Return the values of Megatron's TransformerConfig that precision and kernels decide."""
    # FP8 products read and write bfloat16.
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    values: dict[str, Any] = {
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "gradient_accumulation_fusion": kernels.fuse_layer_gradients,
        "use_te_activation_func": kernels.layer_spec == "te",
        "deterministic_mode": switches.deterministic,
    }
    if kernels.flash_attention is not None:
        values |= {
            "batch_invariant_mode": switches.batch_invariant,
            "attention_backend": AttnBackend.flash,
            "flash_attention_version": kernels.flash_attention,
        }
    return values | (_fp8_values(fp8, kernels.recipe) if precision == "fp8" else {})


def _fp8_values(fp8: Fp8Settings, recipe: str | None) -> dict[str, Any]:
    first, last = fp8.bf16_first_layers, fp8.bf16_last_layers
    has_fine_scales = recipe in ("blockwise", "mxfp8")
    return {
        # Fine-grained scales: gradients need no wider exponent.
        "fp8": "e4m3" if has_fine_scales else "hybrid",
        "fp8_recipe": recipe,
        # For recipe delayed: Megatron's default takes the scale from the last micro-batch only.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "fp8_param": fp8.primary_weights,
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }
