"""The masked-diffusion transformer on Megatron-Core's `TransformerBlock`.

Parameters have GPTModel's names, so other Megatron tools can read the checkpoints.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from agrpo_megatron.config.parallel import padded_vocab, stage_layers
from agrpo_megatron.config.settings import (
    ModelSettings,
    MoeSettings,
    Settings,
)
from agrpo_megatron.diffusion.patterns import full, places_of
from agrpo_megatron.families.lora import adapted_layers
from agrpo_megatron.hardware.kernels import kernels_for
from agrpo_megatron.megatron.layers.config import transformer_config
from agrpo_megatron.megatron.layers.context import padded_rows, part_of, scored_slices
from agrpo_megatron.megatron.layers.head import output_layer
from agrpo_megatron.megatron.layers.invariant import batch_invariant
from agrpo_megatron.megatron.layers.local import local_spec, mark_gates
from agrpo_megatron.megatron.layers.packed import PackedLayout, packed_layout, rotary_angles
from agrpo_megatron.megatron.layers.rotary import query_scale, scaling_of
from agrpo_megatron.megatron.layers.router import Blocks, ExpertRouter, Routing, block_ids
from agrpo_megatron.megatron.layers.scored import ScoredTokens, filled, queries_of
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.megatron.platform import plain_torch
from agrpo_megatron.types import PackedRows


def expert_biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the biases of experts, which no gradient trains, by their names in a model."""
    return ((name, each) for name, each in model.named_buffers() if name.endswith(".expert_bias"))


class MaskedDiffusionModel(LanguageModule):
    """A bidirectional transformer over packed rows; the head runs on scored tokens only.

    Args:
        model: the settings of rotary embeddings and the longest row.
        vocab_rows: rows of embedding and head, a multiple of the tensor-parallel size.
        pre_process, post_process: whether this pipeline stage holds the embedding, the head.
        vp_stage: index among this rank's virtual stages.
        fuse_head_gradient: whether Apex's kernel accumulates the head's gradient.
        use_flex: whether rows with patterns go through FlexAttention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        *,
        ranks: Ranks,
        model: ModelSettings,
        vocab_rows: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int = 0,
        fuse_head_gradient: bool = False,
        use_flex: bool = False,
    ):
        groups = ranks.groups
        super().__init__(config=config, pg_collection=groups)
        self.ranks, self.vp_stage, self.vp_size = ranks, vp_stage, ranks.parallel.virtual
        self.pre_process, self.post_process = pre_process, post_process
        self.use_flex = use_flex
        self.share_embeddings_and_output_weights = model.tie_embeddings
        self.model_type = ModelType.encoder_or_decoder
        self.settings = model
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=vocab_rows,
                max_sequence_length=model.max_sequence_length,
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
            self.output_layer = output_layer(
                config,
                vocab_rows,
                groups.tp,
                fuse_gradient=fuse_head_gradient,
                has_weight=not (model.tie_embeddings and pre_process),
            )
        self.setup_embeddings_and_output_layer()
        # With sequence parallelism, ranks hold equal parts of all tokens.
        self.ends_at_scored = post_process and model.ends_at_scored and not config.sequence_parallel
        if self.ends_at_scored:
            self.takes_queries = ScoredTokens(self.decoder.layers[-1]).takes_queries
        self.routers = [each for each in self.modules() if isinstance(each, ExpertRouter)]
        self.names_cuda = bool(self.routers)  # Megatron's dispatcher of tokens does
        for layer in self.decoder.layers:
            if isinstance(router := getattr(layer.mlp, "router", None), ExpertRouter):
                layer.register_forward_pre_hook(partial(_inform, router), with_kwargs=True)

    @property
    def first_expert(self) -> int:
        """The number of this rank's first expert in every layer of experts."""
        ranks = self.ranks.expert
        return (self.settings.moe.experts or 0) // ranks.size * ranks.rank

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor | None) -> None:
        """Receive the hidden states of the previous stage; called by Megatron's schedule."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.decoder.set_input_tensor(input_tensor)  # type: ignore[arg-type]

    def angles(self, positions: Tensor) -> Tensor:
        """Return the rotary angles of positions [T], [T, 1, rotated width] float32."""
        model = self.settings
        return rotary_angles(
            positions,
            head_dim=model.rotary_width,
            rope_theta=model.rope_theta,
            scaling=scaling_of(model),
        )

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """Return what queries at positions [T] are multiplied by, [T, 1, 1] float32; None: by 1."""
        model = self.settings
        return query_scale(
            positions,
            beta=model.query_scale_beta,
            original_length=model.rope_original_length,
            attention_factor=model.rope_attention_factor,
        )

    @batch_invariant
    def forward(self, rows: PackedRows) -> Tensor:
        """Return the logits [S, V / tensor parallel] of this rank's scored tokens.

        Under context parallelism these are the tokens of `context.scored_slices`, else all. A
        stage without the head returns its hidden states [T / (context * sequence), 1, hidden].
        """
        mine = scored_slices(rows, self.ranks)[self.ranks.context.rank]
        rows = padded_rows(rows, self.ranks)
        context = self.ranks.context
        layout = packed_layout(
            rows,
            angles=self.angles,
            query_scale=self.query_scale,
            context=context,
            use_flex=self.use_flex,
        )
        first, last = part_of(len(rows.tokens), context, context.rank)
        if self.routers:
            layout.routing = self._routing(rows, layout)
        places = rows.scored[mine] - first
        if self.ends_at_scored:
            layout.scored = filled(places, self.ranks.token_multiple)
            layout.queries = queries_of(layout, places) if self.takes_queries else None
        with plain_torch(names_cuda=self.names_cuda):
            hidden = self.body(rows.tokens[first:last], layout)
        if rows.seen is not None and layout.routing.seen is not None:
            self._note(rows.seen, layout.routing.seen)
        return self.head(hidden, places, layout) if self.post_process else hidden

    @batch_invariant
    def body(self, tokens: Tensor, layout: PackedLayout) -> Tensor:
        """Run this rank's tokens [T] through the layers; [T / sequence parallel, 1, hidden].

        The last layer returns the tokens `layout.scored` only, if they are given.
        """
        hidden = self.embedding(tokens[None], None) if self.pre_process else None
        if hidden is not None and torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()  # of a frozen embedding: recomputation needs it
        return self.decoder(hidden, attention_mask=None, packed_seq_params=layout)

    def _routing(self, rows: PackedRows, layout: PackedLayout) -> Routing:
        """Return what the routers need to know of this rank's tokens."""
        tensor, context = self.ranks.tensor, self.ranks.context
        routing = Routing(seen=None if rows.seen is None else {})
        if self.config.moe_aux_loss_coeff:
            routing = replace(routing, share=(len(rows.bounds) - 1) / len(rows.tokens))
        if self.settings.moe.block_experts is not None:
            # Only rows of weight 0 have no pattern.
            whole = [full(end - start) for start, end in pairwise(rows.bounds)]
            ids, count = block_ids(layout.places or places_of(whole, rows.tokens.device))
            group = tensor.group if tensor.size > 1 else None
            routing = replace(
                routing, blocks=Blocks(ids.chunk(tensor.size)[tensor.rank], count, group)
            )
        if rows.experts is not None:
            parts = rows.experts.chunk(context.size * tensor.size)
            mine = parts[context.rank * tensor.size + tensor.rank].to(rows.tokens.device)
            routing = replace(routing, experts=mine, is_replayed=rows.is_replayed)
        return routing

    def _note(self, seen: dict[int, Tensor], mine: dict[int, Tensor]) -> None:
        """Note the choice of each layer for the tokens of all ranks, [T, topk]."""
        dtype = torch.uint8 if (self.settings.moe.experts or 0) <= 256 else torch.int32
        whole = torch.stack(list(mine.values()), 1).to(dtype)
        for axis in (self.ranks.tensor, self.ranks.context):
            if axis.size > 1:
                part, whole = whole, whole.new_empty(axis.size * len(whole), *whole.shape[1:])
                dist.all_gather_into_tensor(whole, part, group=axis.group)
        seen.update(zip(mine, whole.unbind(1), strict=True))

    @batch_invariant
    def head(self, hidden: Tensor, places: Tensor, layout: PackedLayout | None = None) -> Tensor:
        """Return the logits [S, V / tensor parallel] at these positions of the rank's tokens.

        Args:
            layout: of the pass that made `hidden`; None: it returned all tokens.
        """
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        if layout is None or layout.scored is None:
            hidden = hidden[filled(places, 1)]
        is_tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if is_tied else None
        logits, _ = self.output_layer(hidden, weight=weight)
        return logits[: len(places)].squeeze(1)


def _inform(router: ExpertRouter, _: Any, __: tuple[()], inputs: dict[str, Any]) -> None:
    """Give a router the forward pass of its layer; also if the layer is computed again."""
    router.pass_ = inputs["packed_seq_params"].routing


def build_chunks(settings: Settings, ranks: Ranks) -> tuple[MaskedDiffusionModel, ...]:
    """Build this rank's virtual stages of the model, without weights; called by every rank."""
    model, parallel = settings.model, ranks.parallel
    config = transformer_config(settings, parallel, stage=ranks.pipeline.rank)
    layers, stages = stage_layers(model, parallel), parallel.pipeline * parallel.virtual
    kernels = kernels_for(settings)
    make_spec = local_spec
    if kernels.layer_spec == "te":
        from agrpo_megatron.megatron.layers.te import te_spec  # Transformer Engine is optional

        adapted = adapted_layers(model, settings.lora) if settings.lora.rank is not None else []
        make_spec = partial(
            te_spec,
            has_patterns=settings.has_patterns,
            groups_experts=not any(layer.is_expert for layer in adapted),
        )
    chunks = []
    for number in range(parallel.virtual):
        stage = number * parallel.pipeline + ranks.pipeline.rank
        first = sum(layers[:stage])
        chunk = MaskedDiffusionModel(
            config,
            make_spec(config, _experts_of(model, range(first, first + layers[stage]))),
            ranks=ranks,
            model=model,
            vocab_rows=padded_vocab(settings),
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            vp_stage=number,
            fuse_head_gradient=kernels.fuse_head_gradient,
            use_flex=kernels.flex_attention,
        )
        chunk.names_cuda |= kernels.layer_spec == "te"
        mark_gates(chunk)
        chunks.append(chunk.cuda() if torch.cuda.is_available() else chunk)
    return tuple(chunks)


def _experts_of(model: ModelSettings, layers: Iterable[int]) -> list[MoeSettings | None]:
    """Return the experts of some layers; None: a layer has a SwiGLU."""
    dense = model.num_layers - model.moe_layers
    return [None if layer < dense else model.moe for layer in layers]
