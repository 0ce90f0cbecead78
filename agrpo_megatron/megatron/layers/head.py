"""The head, which may share its weights with the embedding."""

from dataclasses import replace

import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_config import TransformerConfig


def output_layer(
    config: TransformerConfig,
    vocab_rows: int,
    group: dist.ProcessGroup,
    *,
    fuse_gradient: bool,
    has_weight: bool,
) -> tensor_parallel.ColumnParallelLinear:
    """Return the head; in both specs it is Megatron's own layer, which only Apex can fuse.

    Scored tokens are gathered before the head, so it is not sequence-parallel: its input is whole
    on every rank and its input gradient is summed.

    Args:
        has_weight: whether it has a weight; else a tied one is passed to each call.
    """
    assert config.init_method is not None
    return tensor_parallel.ColumnParallelLinear(
        config.hidden_size,
        vocab_rows,
        config=replace(config, sequence_parallel=False, gradient_accumulation_fusion=fuse_gradient),
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_weight_param_allocation=not has_weight,
        tp_group=group,
    )


def copy_tied_weights(stage: LanguageModule) -> None:
    """Copy a tied embedding to the head on the last stage; called by every rank, for each stage."""
    if stage.share_embeddings_and_output_weights and stage._is_in_embd_group():
        weight = stage.shared_embedding_or_output_weight()
        assert weight is not None and stage.embd_group is not None
        first = dist.get_process_group_ranks(stage.embd_group)[0]
        dist.broadcast(weight.data, first, group=stage.embd_group)
