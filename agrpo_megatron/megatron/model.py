"""The masked-diffusion transformer on Megatron-Core's `TransformerBlock`.

Parameter names are GPTModel's, so other Megatron tools read the checkpoints.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from agrpo_megatron.megatron.spec import local_spec, packed_layout
from agrpo_megatron.settings import ModelSettings, ParallelSettings
from agrpo_megatron.types import PackedRows


class MaskedDiffusionModel(LanguageModule):
    """A bidirectional transformer over packed rows; the head sees the scored tokens only.

    Args:
        vocab_rows: rows of embedding and head, a multiple of the tensor-parallel size.
        pre_process, post_process: whether this pipeline stage holds the embedding, the head.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        *,
        vocab_rows: int,
        max_sequence_length: int,
        rope_theta: float,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(config=config, pg_collection=groups)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        self.rope_theta = rope_theta
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=vocab_rows,
                max_sequence_length=max_sequence_length,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
        self.decoder = TransformerBlock(
            config=config,
            spec=spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process:
            assert config.init_method is not None
            # Scored tokens are gathered before the head, so the head itself is not sequence-
            # parallel: its input is whole on every rank and its input gradient is summed.
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                vocab_rows,
                config=replace(config, sequence_parallel=False),
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=groups.tp,
            )
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor | None) -> None:
        """Receive the hidden states of the previous stage; called by Megatron's schedule."""
        if isinstance(input_tensor, list):
            assert len(input_tensor) == 1
            input_tensor = input_tensor[0]
        self.decoder.set_input_tensor(input_tensor)  # type: ignore[arg-type]

    def forward(self, rows: PackedRows) -> Tensor:
        """Return the logits [S, V / tensor parallel] of the scored tokens.

        A stage without the head returns its hidden states [T / sequence parallel, 1, hidden].
        """
        rows = self._padded(rows)
        head_dim = self.config.kv_channels
        assert head_dim is not None
        layout = packed_layout(rows.cu_seqlens, head_dim=head_dim, rope_theta=self.rope_theta)
        hidden = self.embedding(rows.tokens[None], None) if self.pre_process else None
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=layout)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        logits, _ = self.output_layer(hidden[rows.scored])
        return logits.squeeze(1)

    def _padded(self, rows: PackedRows) -> PackedRows:
        """Append a row of padding where sequence parallelism needs an even split."""
        parts = self.config.tensor_model_parallel_size
        missing = -len(rows.tokens) % parts if self.config.sequence_parallel else 0
        if not missing:
            return rows
        end = rows.cu_seqlens[-1:] + missing
        return PackedRows(
            F.pad(rows.tokens, (0, missing)), torch.cat([rows.cu_seqlens, end]), rows.scored
        )


def transformer_config(model: ModelSettings, parallel: ParallelSettings) -> TransformerConfig:
    """Translate settings into Megatron's own; `model.megatron` wins.

    Raises:
        ValueError: Megatron refuses a value or does not know a key of `model.megatron`.
    """
    values = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
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
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "calculate_per_token_loss": True,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "perform_initialization": False,  # weights come by name, see `families`
        "use_cpu_initialization": not torch.cuda.is_available(),
    }
    try:
        return TransformerConfig(**{**values, **model.megatron})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"model.megatron={model.megatron}: Megatron refuses it: {error}") from None


def build_model(model: ModelSettings, parallel: ParallelSettings) -> MaskedDiffusionModel:
    """Build this rank's part of the model, without weights; called by every rank."""
    assert model.vocab_size is not None
    config = transformer_config(model, parallel)
    network = MaskedDiffusionModel(
        config,
        local_spec(config),
        vocab_rows=padded_vocab(model.vocab_size, parallel.tensor),
        max_sequence_length=model.max_sequence_length,
        rope_theta=model.rope_theta,
    )
    return network.cuda() if torch.cuda.is_available() else network


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """Return the embedding's rows: padded only as far as the tensor-parallel split needs."""
    return -(-vocab_size // tensor) * tensor
