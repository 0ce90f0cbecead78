"""The router: which experts a token has, and with which weights.

Megatron's router with our own choice: groups are ranked by their two best experts, as published
code does, and a block may admit experts for its tokens. Losses that balance experts and the count
of their tokens are Megatron's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from agrpo_megatron.config.settings import MoeSettings
from agrpo_megatron.diffusion.patterns import Places


@dataclass(frozen=True)
class Blocks:
    """The block of each token of a forward pass, for experts that a block admits."""

    ids: Tensor  # [T] int64, of this rank's tokens
    count: int  # of all ranks that share the rows
    group: dist.ProcessGroup | None = None  # ranks with other tokens of the blocks; None: none

    def best(self, scores: Tensor) -> Tensor:
        """Return the largest score of each expert in each block, [blocks, experts]."""
        best = scores.new_full((self.count, scores.shape[1]), -torch.inf)
        best = best.scatter_reduce(0, self.ids[:, None].expand_as(scores), scores, "amax")
        if self.group is not None:
            dist.all_reduce(best, dist.ReduceOp.MAX, group=self.group)
        return best


def block_ids(places: Places) -> tuple[Tensor, int]:
    """Return a number [T] for the block of each token, and the count of blocks."""
    columns = torch.stack([places.row, places.span, places.first])
    found, ids = columns.unique(dim=1, return_inverse=True)
    return ids, found.shape[1]


@dataclass(frozen=True)
class Routing:
    """What the routers of a forward pass know besides logits, and where they note their choice."""

    blocks: Blocks | None = None
    experts: Tensor | None = None  # [T, layers, topk] int16 of a rollout; -1: not known
    is_replayed: bool = False  # whether known experts of the rollout are chosen
    seen: dict[int, Tensor] | None = None  # takes the choice [T, topk] of each layer
    share: float = 1.0  # rows by tokens, of all ranks that share the rows


def scores_of(logits: Tensor, moe: MoeSettings) -> Tensor:
    """Return the scores [T, experts] of a router's logits."""
    return logits.float().softmax(-1) if moe.score == "softmax" else logits.float().sigmoid()


@torch.no_grad()
def choose(
    scores: Tensor, moe: MoeSettings, *, bias: Tensor | None = None, blocks: Blocks | None = None
) -> Tensor:
    """Return the experts of each token, [T, topk].

    Args:
        bias: of each expert in the choice, [experts].
        blocks: of the tokens, if a block admits experts.
    """
    ranks = scores if bias is None else scores + bias
    return _admitted(ranks, moe, blocks).topk(moe.topk, dim=-1).indices


def weigh(scores: Tensor, chosen: Tensor, moe: MoeSettings) -> Tensor:
    """Return the weights [T, topk] of chosen experts."""
    weights = scores.gather(1, chosen)
    # Published code leaves a single sigmoid as it is.
    if moe.normalise and (moe.topk > 1 or moe.score == "softmax"):
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * moe.scaling_factor


def _admitted(ranks: Tensor, moe: MoeSettings, blocks: Blocks | None) -> Tensor:
    """Return the ranks [T, experts]; -inf where a token's groups or block exclude an expert."""
    if moe.groups is not None:
        assert moe.group_topk is not None
        grouped = ranks.unflatten(1, (moe.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(moe.group_topk, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, value=True)
        return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    if moe.block_experts is not None:
        assert blocks is not None
        best = blocks.best(ranks).topk(moe.block_experts, dim=-1).indices
        kept = torch.zeros_like(ranks[:1], dtype=torch.bool).expand(blocks.count, -1)
        return ranks.masked_fill(~kept.scatter(1, best, value=True)[blocks.ids], -torch.inf)
    return ranks


class ExpertRouter(TopKRouter):
    """Megatron's router with the choice of `choose` and the weights of `weigh`."""

    pass_ = Routing()  # the forward pass that runs

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection,
        moe: MoeSettings,
        **kwargs: Any,
    ):
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        self.moe = moe
        self.counts: Tensor | None = None  # choices changed and compared, in passes with gradient

    def get_aux_loss_coeff(self, aux_loss_type: str) -> float:
        """Return the weight of the balancing loss, so that it counts once for each row.

        Megatron multiplies it by the tokens, as it divides gradients by tokens. Here they are
        divided by rows.
        """
        return super().get_aux_loss_coeff(aux_loss_type) * self.pass_.share

    @property
    def number(self) -> int:
        """The number of this layer among those with experts."""
        assert self.layer_number is not None
        return self.layer_number - 1 - self.moe.dense_layers

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and choice of each token as [T, experts], zero and false elsewhere."""
        assert padding_mask is None
        logits = self.apply_z_loss(logits.flatten(0, -2))
        scores = scores_of(logits, self.moe)
        chosen = self._chosen(scores)
        weights = weigh(scores, chosen, self.moe)
        probs = torch.zeros_like(logits).scatter(1, chosen, weights.to(logits.dtype))
        chosen_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, value=True)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            counted, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function
            )
            probs = self._apply_aux_loss(probs, scores, counted)
        self._apply_expert_bias(chosen_map)
        return probs, chosen_map

    def _chosen(self, scores: Tensor) -> Tensor:
        """Return the experts of each token, its own or the rollout's, and note them."""
        routing = self.pass_
        chosen = choose(scores, self.moe, bias=self.expert_bias, blocks=routing.blocks)
        if routing.experts is not None:
            given = routing.experts[:, self.number].long()
            is_known = given >= 0
            # A recomputed layer runs twice, once with gradient.
            if self.training and torch.is_grad_enabled():
                is_other = (given[:, :, None] != chosen[:, None]).all(-1)
                found = torch.stack([(is_other & is_known).sum(), is_known.sum()])
                self.counts = found if self.counts is None else self.counts + found
            chosen = torch.where(is_known, given, chosen) if routing.is_replayed else chosen
        if routing.seen is not None:
            routing.seen[self.number] = chosen
        return chosen
