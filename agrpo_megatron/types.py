"""The records that flow through a run; a stage that adds information returns a new record.

    Problem -> prompt ids -> Trajectory -> rewards -> advantages = Rollout
            -> states, targets and weights = ScoredRows -> TimestepBatch -> scored log-probs
            = LossInputs -> LossOutputs

Shapes: R rollouts; C completion, S scored and T packed tokens; N scored rows; K support ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from agrpo_megatron.config.settings import SamplingSettings

if TYPE_CHECKING:  # tasks read this file, and need no torch
    from torch import Tensor


class Message(NamedTuple):
    """One message of a chat."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Chat:
    """A prompt that the tokenizer's chat template lays out."""

    messages: tuple[Message, ...]
    prefill: str = ""  # start of the assistant's turn, before the completion


type Prompt = str | Chat


@dataclass(frozen=True)
class Problem:
    """One problem of a task: the input of its grader, and a solution to learn from."""

    key: str  # unique within the task; two problems with one key are the same problem
    fields: dict[str, Any]  # input of `prompt` and `reward`
    solution: str  # a right completion, for supervised fine-tuning; empty where none is known
    task: str = ""  # label of its task within a mixture


@dataclass(frozen=True)
class Reward:
    """A graded completion."""

    score: float  # maximised by the policy gradient
    correct: bool  # counted by accuracy
    parts: dict[str, float] = field(default_factory=dict)  # named shares of the score
    failure: str | None = None  # why grading failed, such as "timeout"


@dataclass(frozen=True)
class Trajectory:
    """R completions with the record of their sampling: enough to re-score every step.

    Position j of rollout r is `tokens[r, j] if unmask_step[r, j] < t else mask` before step t. With
    edits, `tokens` is the final text, and `trajectories.tokens_before` the text at t.
    """

    prompts: tuple[Tensor, ...]  # R tensors of prompt ids, int64
    tokens: Tensor  # [R, C] int64
    unmask_step: Tensor  # [R, C] int64; steps count up from 0 in each rollout
    logprobs: Tensor  # [R, C] float32, nats, of the token when drawn; 0 if not drawn
    entropies: Tensor  # [R, C] float32, nats, of the distribution of the draw; 0 likewise
    spreads: Tensor  # [R, C] float32, 1 - sum p^2 of it: 0 only if no other token could be drawn
    support_ids: Tensor | None  # [R, C, K] int32 candidates kept by top-k/top-p, padded with -1
    num_steps: Tensor  # [R] int64 forward passes; tokens with unmask_step >= this were filled in
    rollout_ids: Tensor  # [R] int64, the rollout index of the noise
    sampling: SamplingSettings
    weights_version: int = 0  # iterations finished before the sampling
    # All that each step drew, kept or put back, by place in its block; None unless
    # `sampling.record_drawn`. Log-probs and spreads are 0 where no token was drawn.
    drawn_tokens: Tensor | None = None  # [R, steps, block] int32; -1 where none was drawn
    drawn_logprobs: Tensor | None = None  # [R, steps, block] float32, nats
    drawn_spreads: Tensor | None = None  # [R, steps, block] float32
    # Of drawn positions; None unless `sampling.position_temperature`.
    turns: Tensor | None = None  # [R, C] int32, turn of the position within its step, from 0
    turn_logprobs: Tensor | None = None  # [R, C] float32, nats, of the position at its turn
    # The edits of each rollout, in the order of their steps: a step overwrote a token that was
    # fixed before. None unless `sampling.edit_threshold`; padded with -1 to the most edits, E.
    # What is recorded at [R, C] is of the first token of a position.
    edit_step: Tensor | None = None  # [R, E] int64
    edit_position: Tensor | None = None  # [R, E] int64, in the completion
    edit_old: Tensor | None = None  # [R, E] int64
    edit_new: Tensor | None = None  # [R, E] int64
    edit_logprob: Tensor | None = None  # [R, E] float32, nats, of the new token when drawn
    edit_entropy: Tensor | None = None  # [R, E] float32, nats, of the distribution of the draw
    edit_spread: Tensor | None = None  # [R, E] float32, 1 - sum p^2 of it
    edit_support_ids: Tensor | None = None  # [R, E, K] int32

    @property
    def is_sampled(self) -> Tensor:
        """Mark the tokens [R, C] that a denoising step fixed; the others were filled in."""
        return self.unmask_step < self.num_steps[:, None]


@dataclass(frozen=True)
class GradedRollouts:
    """Graded completions of all ranks, in the order of the problems; the same on every rank."""

    trajectory: Trajectory
    rewards: list[Reward]
    tokens: int  # packed tokens processed by the network
    bubble: float  # share of the pipeline's stage-slots in which a stage was idle
    seconds: dict[str, float]  # on this rank: see `rollout.generate.generate`
    experts: dict[int, Any] | None = None  # this rank's `rollout.experts.Record`s, by rollout id
    passes: int = 0  # forward passes of the network, of all replicas


@dataclass(frozen=True)
class Rollout:
    """Trajectories with their rewards; rollouts of one problem are neighbours, group_size each."""

    trajectory: Trajectory
    rewards: Tensor  # [R] float32
    correct: Tensor  # [R] bool
    advantages: Tensor  # [R] float32
    experts: dict[int, Any] | None = None  # this rank's `rollout.experts.Record`s, by rollout id
    staleness: int = 0  # iterations whose updates came after the sampling


@dataclass(frozen=True)
class StepDraws:
    """Drawn (rollout, denoising step) rows and the weight of each in the loss.

    A row's weight includes its importance weight over the proposal, the division by the number of
    draws, and the normaliser over live steps, but not the mean over rollouts.
    """

    rollout: Tensor  # [N] int64
    step: Tensor  # [N] int64
    weight: Tensor  # [N] float32 or float64


@dataclass(frozen=True)
class ScoredRows:
    """What an estimator scores: partially masked states of rollouts, targets and weights.

    A weight includes everything but the mean over rollouts. With `unit`, ratio, clip and KL are of
    units: the log-likelihood of one is the sum of `coefficient` times log-prob over its tokens.
    """

    rollout: Tensor  # [N] int64
    hidden: Tensor  # [N, C] bool, completion positions that hold the mask token
    scored: Tensor  # [N, C] bool, positions whose token is a target
    weight: Tensor  # [N, C] float32 or float64, of the token, or of its unit
    is_sampled: bool  # each state and target is the sampler's: the rollout has its log-probs
    hidden_prompt: tuple[Tensor, ...] | None = None  # N tensors [prompt length] bool
    unit: Tensor | None = None  # [N, C] int64 from 0; None: each token is its own unit
    coefficient: Tensor | None = None  # [N, C] of the log-prob in the unit's log-likelihood
    kl_weight: Tensor | None = None  # [N, C] of the KL; None: as `weight`
    advantage: Tensor | None = None  # [N]; None: that of the row's rollout
    length: Tensor | None = None  # [N] completion tokens in the state; None: all
    targets: Tensor | None = None  # [N, C] ids; None: the tokens of the rollout
    target_logprobs: Tensor | None = None  # [N, C] of `targets`, when the sampler drew them
    # With them, the loss also has the choice of positions among the scored ones, as a unit a row.
    turns: Tensor | None = None  # [N, C] int64; -1 where the row's step did not choose
    turn_logprobs: Tensor | None = None  # [N, C] of the positions, when the sampler drew them
    step: Tensor | None = None  # [N] that saw the state; None: none did, it shows the final text

    @property
    def has_token(self) -> Tensor:
        """Mark the scored positions [N, C] whose token is in the loss."""
        return self.scored if self.turns is None else self.turns >= 0


class Span(NamedTuple):
    """Neighbouring tokens of a packed row, at consecutive positions; see `diffusion.patterns`."""

    length: int
    start: int = 0  # position of the first token
    block: int | None = None  # block length; 1: causal; None: the span is one block
    is_copy: bool = False
    origin: int = 0  # a position at which a block begins; the others follow, and precede
    ahead: int | None = None  # in one block: tokens after its own that a token sees; None: all
    is_inside: bool = False  # a copy that also sees the context after its block


type Row = tuple[Span, ...]


class KeyStore(Protocol):
    """Keys and values of rows in flight; see `megatron.layers.cache`."""

    slots: int  # rows that it holds

    def copy(self, layer: int, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy the first tokens of slots to others."""

    def read(self, layer: int, slots: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of slots from token `first` up to `end`."""
        ...

    def write(self, layer: int, slots: Tensor, first: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values of slots from token `first` on."""


@dataclass(frozen=True)
class CachedRows:
    """The part of packed rows that is not packed: tokens whose keys are cached."""

    store: KeyStore
    slots: Sequence[int]  # of each row
    before: Sequence[int]  # cached tokens of each row before its packed ones
    keep: Sequence[int]  # packed tokens of each row whose keys are to be cached: its first ones
    copies: Sequence[tuple[int, int, int]]  # from a slot, to a slot, tokens: before all else
    after: Sequence[int]  # cached tokens of each row after its packed ones


@dataclass(frozen=True)
class PackedRows:
    """Rows laid end to end without padding."""

    tokens: Tensor  # [T] int64
    cu_seqlens: Tensor  # [rows + 1] int32
    scored: Tensor  # [S] int64 indices into the T tokens; the head runs on these only
    host_bounds: Sequence[int] | None = None  # cu_seqlens, where the host knows them already
    # Who sees whom, by row; None: within rows, all tokens see each other.
    patterns: Sequence[Row] | None = None
    cached: CachedRows | None = None  # then `patterns` are of whole rows
    # Of a rollout's rows: their numbers, and the tokens before the open block of a block model.
    owners: Sequence[tuple[int, int]] | None = None
    experts: Tensor | None = None  # [T, layers, topk] int16 of the rollout; -1: not known
    is_replayed: bool = False  # routers reuse them; else they only count what they choose otherwise
    seen: dict[int, Tensor] | None = None  # takes each layer's choice [T, topk]; None: not kept

    @cached_property
    def bounds(self) -> Sequence[int]:
        """Return cu_seqlens on the host; a GPU is waited for only if they must be read from it."""
        return self.cu_seqlens.tolist() if self.host_bounds is None else self.host_bounds


@dataclass(frozen=True)
class TimestepBatch:
    """One micro-batch of the policy gradient: partially masked states, and their scored tokens."""

    rows: PackedRows
    targets: Tensor  # [S] int64
    support_ids: Tensor | None  # [S, K] int32; None: the whole vocabulary
    old_logprobs: Tensor | None  # [S] float32, of the rollout; None: not known yet
    reference_logprobs: Tensor | None  # [S] float32, from the frozen reference
    advantages: Tensor  # [S] float32, of the rollout the token belongs to
    weights: Tensor  # [S] float32, of the token
    kl_weights: Tensor  # [S] float32
    sources: Tensor  # [S] int64, which of the R rollouts the token belongs to
    row: Tensor  # [S] int64, which of the N rows
    position: Tensor  # [S] int64, in the completion
    reference_shard: Tensor | None = None  # [S, V / tensor parallel] its log-probs; kl=exact


@dataclass(frozen=True)
class LossInputs:
    """Scored tokens, or units, as a loss receives them.

    A loss of single tokens receives those of one micro-batch of one rank; all others receive all
    tokens of the update, in the order of rows and positions.
    """

    logprobs: Tensor  # [S] nats, of the current policy, with gradient
    old_logprobs: Tensor  # [S] nats, of the policy that sampled
    reference_logprobs: Tensor | None  # [S] nats, of the frozen reference
    advantages: Tensor  # [S]
    weights: Tensor  # [S], including everything but the mean over rollouts
    kl_weights: Tensor  # [S]
    rollout: Tensor  # [S] int64, which of the R rollouts the token belongs to
    row: Tensor  # [S] int64, which of the N rows
    position: Tensor  # [S] int64, in the completion
    unit: Tensor | None = None  # [S] int64, see ScoredRows; None: each token is its own unit
    coefficient: Tensor | None = None  # [S]


@dataclass(frozen=True)
class LossOutputs:
    """A loss summed over rollouts, and its metrics.

    A metric is summed over micro-batches and ranks; one named `*_max*` is maximised; one named
    `*_p99*` has one value per token [S], -1 where there is none, and becomes their percentile.
    """

    loss: Tensor  # scalar
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class SftBatch:
    """One micro-batch of masked-diffusion cross-entropy."""

    rows: PackedRows
    targets: Tensor  # [S] int64
    weights: Tensor  # [S] float32: 1 / (t * length), see `diffusion.losses`
    sources: Tensor  # [S] int64, which example the token belongs to
