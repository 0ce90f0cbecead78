"""Run packed rows through a torch module that maps ids [B, S] to logits [B, S, V].

Rows of equal length are one batch. Rows of different lengths are padded into one batch if the
module honours an attention mask, and are one batch for each length otherwise. Both are exact.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from agrpo_megatron.config.rules.blocks import validate_block_model
from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.diffusion.draw import Draw, DrawAt
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.diffusion.sampler import SamplerContext
from agrpo_megatron.types import PackedRows

MASK = "attention_mask"


class ModuleForward:
    """A `Forward` over a module; `score` has gradients, the call of the sampler has none."""

    in_flight = 1

    def __init__(self, module: nn.Module, *, mask_id: int, block_length: int | None = None):
        self.module, self._block_length = module, block_length
        self._fillers = mask_id, int(mask_id == 0)  # two ids for padding
        self._has_mask: bool | None = None  # not known before rows of different lengths

    @torch.no_grad()
    def __call__(self, rows: PackedRows, draw_at: DrawAt) -> Callable[[], Draw]:
        """Draw from the logits of the module."""
        draw = draw_at(self.score(rows), slice(None))
        return lambda: draw

    def close(self) -> None:
        """Do nothing: no group is in flight."""

    def score(self, rows: PackedRows) -> Tensor:
        """Return the logits [S, V] at the scored tokens, with gradient.

        Raises:
            ValueError: the module is in training mode, on another device, returns something else,
                or its blocks begin elsewhere.
        """
        self._check(rows)
        starts, lengths = rows.cu_seqlens[:-1].long(), rows.cu_seqlens.diff().long()
        row = torch.bucketize(rows.scored, rows.cu_seqlens[1:].long(), right=True)
        column, ids = rows.scored - starts[row], rows.tokens.split(lengths.tolist())
        logits, order = [], []
        for chosen in self._batches(ids, lengths):
            place = torch.full_like(lengths, -1)
            place[chosen] = torch.arange(len(chosen), device=place.device)
            mine = (place[row] >= 0).nonzero()[:, 0]
            found = self._logits([ids[number] for number in chosen.tolist()])
            logits.append(found[place[row[mine]], column[mine]])
            order.append(mine)
        return torch.cat(logits)[torch.cat(order).argsort()]

    def _batches(self, ids: Sequence[Tensor], lengths: Tensor) -> Iterator[Tensor]:
        """Yield the numbers of the rows of each batch."""
        sizes = lengths.unique()
        if len(sizes) > 1 and self._honours_mask(ids):
            yield torch.arange(len(ids), device=lengths.device)
            return
        for size in sizes:
            yield (lengths == size).nonzero()[:, 0]

    @torch.no_grad()
    def _honours_mask(self, ids: Sequence[Tensor]) -> bool:
        """Return whether padding leaves the module's logits as they are.

        They have to be equal to the last bit under other padding, and up to rounding without any.
        Some modules take a mask and ignore it, such as the first modelling code of LLaDA-8B.
        """
        if self._has_mask is None:
            inner = getattr(self.module, "module", self.module)  # of DistributedDataParallel
            known = inspect.signature(inner.forward).parameters.values()
            self._has_mask = any(p.name == MASK or p.kind is p.VAR_KEYWORD for p in known)
            if self._has_mask:
                is_real = _mask_of(ids).bool()
                first, second = (self._logits(ids, filler)[is_real] for filler in self._fillers)
                self._has_mask = torch.equal(first, second) and self._is_unpadded(ids, first)
        return self._has_mask

    def _is_unpadded(self, ids: Sequence[Tensor], padded: Tensor) -> bool:
        """Return whether the shortest row alone has the logits that it has in a padded batch.

        Args:
            padded: [tokens of all rows, V] of the batch.
        """
        lengths = [len(row) for row in ids]
        number = lengths.index(min(lengths))
        alone, together = self._logits([ids[number]])[0], padded.split(lengths)[number]
        rounding = torch.finfo(alone.dtype).eps ** 0.5 * float(alone.abs().max())
        return bool((alone - together).abs().max() <= rounding)

    def _logits(self, ids: Sequence[Tensor], filler: int | None = None) -> Tensor:
        """Return the logits [B, longest, V] of rows."""
        value = self._fillers[0] if filler is None else filler
        padded = pad_sequence(list(ids), batch_first=True, padding_value=value)
        is_padded = any(len(row) < padded.shape[1] for row in ids)
        output = self.module(padded, **({MASK: _mask_of(ids)} if is_padded else {}))
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.shape[:2] != padded.shape or logits.ndim != 3:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{type(self.module).__name__} maps ids {list(padded.shape)} to {got}; it must "
                "return logits [B, S, V], or an object with them as `logits`, such as an "
                "AutoModelForMaskedLM of transformers"
            )
        return logits

    def _check(self, rows: PackedRows) -> None:
        name, parameter = type(self.module).__name__, next(self.module.parameters(), None)
        if self.module.training:
            raise ValueError(
                f"{name} is in training mode, in which dropout changes its logits from pass to "
                "pass; call eval(), which has gradients too"
            )
        if parameter is not None and parameter.device != rows.tokens.device:
            raise ValueError(
                f"{name} is on {parameter.device} and the tokens are on {rows.tokens.device}; put "
                "prompts and rollout_ids on the device of the module"
            )
        for pattern in rows.patterns or ():
            if len(pattern) != 1 or pattern[0].origin % (self._block_length or 1):
                raise ValueError(
                    "the blocks of the module begin at the first token of a row; use "
                    "SamplingSettings(block_origin='row')"
                )


def _mask_of(ids: Sequence[Tensor]) -> Tensor:
    """Return the mask [B, longest] int64 of rows padded at their end: 1 for their own tokens."""
    return pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)


def module_context(
    module: nn.Module,
    *,
    mask_id: int,
    eos_id: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    shift: bool = False,
    block_length: int | None = None,
    token_budget: int = 16384,
    stop_ids: tuple[int, ...] = (),
    may_draw_mask: bool = False,
) -> SamplerContext:
    """Return what `sample` and updates need of a module that maps ids [B, S] to logits [B, S, V].

    Args:
        module: in evaluation mode; its logits, or an object with `logits`. If it honours
            `attention_mask` [B, S], rows of different lengths are padded into one batch.
        mask_id: of the mask token.
        eos_id: of end-of-text, which ends a row; None: no row ends early.
        seed: of all noise.
        vocab_size: ids that may be drawn, from 0; None: `module.config.vocab_size`.
        shift: the logits at position i - 1 predict token i, as in Dream.
        block_length: of a module that attends by blocks of its own, such as SDAR; None: each
            token sees its whole row.
        token_budget: tokens of one forward pass, padding not counted.
        stop_ids: tokens that end a row under `SamplingSettings(end_at_stop=True)`.
        may_draw_mask: the mask token may be drawn, as in published code; goes with
            `SamplingSettings(forbid_mask_token=False)`.

    Raises:
        ValueError: an id is outside the vocabulary, the vocabulary is not known, or blocks do not
            go with the shift.
    """
    size = vocab_size or getattr(getattr(module, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"{type(module).__name__} has no config.vocab_size; give vocab_size, the number of ids"
        )
    named = [("mask_id", mask_id), ("eos_id", eos_id), *(("stop_ids", stop) for stop in stop_ids)]
    for name, value in named:
        if value is not None and not 0 <= value < size:
            raise ValueError(f"{name}={value} is not below vocab_size={size}; correct one of them")
    if token_budget < 1:
        raise ValueError(f"token_budget={token_budget} holds no token; give for example 16384")
    blocks: dict[str, Any] = {}
    if block_length is not None:
        blocks = {"attention": "block_causal", "block_length": block_length}
    model = ModelSettings(shift=shift, **blocks)
    validate_block_model(model)
    return SamplerContext(
        forward=ModuleForward(module, mask_id=mask_id, block_length=block_length),
        vocab=Vocabulary(size, forbidden=() if may_draw_mask else (mask_id,)),
        mask_id=mask_id,
        eos_id=eos_id,
        seed=seed,
        token_budget=token_budget,
        model=model,
        stop_ids=stop_ids,
    )
