"""Megatron's record of a model's settings, for one pipeline stage."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from agrpo_megatron.config.parallel import stage_layers
from agrpo_megatron.config.settings import ModelSettings, ParallelSettings, Settings
from agrpo_megatron.hardware.kernels import kernels_for
from agrpo_megatron.megatron.precision import kernel_values
from agrpo_megatron.megatron.records import megatron_record


class _StageLayout(PipelineParallelLayerLayout):
    """Megatron's table of layers by stage, for our stage instead of the global one."""

    def __init__(self, stages: list[list[str]], size: int, stage: int):
        super().__init__(stages, size)  # type: ignore[arg-type]
        self.stage = stage

    def get_layer_offset(self, *args: Any, **kwargs: Any) -> int:
        """Return how many layers come before a virtual stage of this rank."""
        return super().get_layer_offset(*args, **{**kwargs, "pp_rank": self.stage})


def transformer_config(
    settings: Settings, parallel: ParallelSettings, *, stage: int
) -> TransformerConfig:
    """Translate settings into Megatron's for a pipeline stage; `model.megatron` overrides.

    Raises:
        ValueError: Megatron refuses a value or does not know a key of `model.megatron`.
    """
    model, precision, fp8 = settings.model, settings.precision, settings.fp8
    values = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.head_width,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": model.init_std,
        "calculate_per_token_loss": True,
        "moe_token_dispatcher_type": "alltoall",  # the default needs equal lengths
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "perform_initialization": False,  # weights are loaded by name, see `families`
        "use_cpu_initialization": not torch.cuda.is_available(),
        **kernel_values(precision, fp8, settings.kernels, kernels_for(settings)),
        **_layout_values(model, parallel, stage),
        **_expert_values(model, parallel),
    }
    return megatron_record(TransformerConfig, values, model.megatron, key="model.megatron")


def _expert_values(model: ModelSettings, parallel: ParallelSettings) -> dict[str, Any]:
    """Return Megatron's settings of experts; groups and weights are those of `router` instead."""
    moe = model.moe
    if moe.experts is None:
        return {}
    kinds = [0] * moe.dense_layers + [1] * model.moe_layers
    return {
        "num_moe_experts": moe.experts,
        "moe_router_topk": moe.topk,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_layer_freq": kinds if moe.dense_layers else 1,  # a list: not stacked in checkpoints
        "moe_router_score_function": moe.score,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,  # one expert of a token needs it
        "moe_grouped_gemm": True,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def _layout_values(model: ModelSettings, parallel: ParallelSettings, stage: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "context_parallel_size": parallel.context,
        "pipeline_model_parallel_size": parallel.pipeline,
        "variable_seq_lengths": parallel.virtual == 1,  # see `context.for_schedule`
        "overlap_p2p_comm": parallel.virtual > 1,  # else two stages mix up the two directions
        "batch_p2p_comm": parallel.virtual == 1,
    }
    if parallel.pipeline > 1:
        stages = [["decoder"] * count for count in stage_layers(model, parallel)]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        values["pipeline_model_parallel_layout"] = _StageLayout(stages, parallel.pipeline, stage)
    return values
