"""Which rows a forward pass of the sampler takes, and where their keys and values are cached.

Continuous batching: waiting rows take the place of finished ones, longest first. With a cache, each
row in flight has a slot of it. Rows of one prompt share its computation: the first of them computes
the prompt's keys, and the others start one step later, with a copy.

The slots of a cached policy hold what a block's first step computed of the whole row. Its later
steps compute the block alone, so rows whose blocks begin together are too many for one forward
pass, and some wait.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings, SamplingSettings
from agrpo_megatron.diffusion.blocks import open_block, open_part, state_rows
from agrpo_megatron.diffusion.packing import on_device, pack_scored
from agrpo_megatron.diffusion.patterns import full
from agrpo_megatron.diffusion.sampler_state import SamplerState
from agrpo_megatron.types import CachedRows, KeyStore, PackedRows


@dataclass(frozen=True)
class Start:
    """Where a row begins: its slot, and the slot that holds its prompt's keys."""

    slot: int
    source: int | None  # None: the row computes them itself


@dataclass
class Slots:
    """The slots of a cache: who has which, and whose prompt each still holds."""

    store: KeyStore
    prompts: Sequence[bytes]  # of each row
    free: list[int] = field(default_factory=list)
    starts: dict[int, Start] = field(default_factory=dict)  # by row in flight
    holders: dict[bytes, list[int]] = field(default_factory=dict)  # slots by finished prompt
    held: dict[int, bytes] = field(default_factory=dict)  # and the inverse
    # By row in flight: cached tokens; under a cached policy, the first one of the open block.
    cached: dict[int, int] = field(default_factory=dict)
    computing: set[bytes] = field(default_factory=set)  # prompts, by rows in their first step

    def is_known(self, row: int) -> bool:
        """Return whether a slot holds the keys of a row's prompt."""
        return bool(self.holders.get(self.prompts[row]))

    def start(self, row: int) -> None:
        """Give a row a free slot, if there is one that of its prompt."""
        prompt = self.prompts[row]
        holders = self.holders.get(prompt, [])
        own = next((slot for slot in holders if slot in self.free), None)
        slot = self.free[-1] if own is None else own
        self.free.remove(slot)
        source = own if own is not None else next(iter(holders), None)
        self.starts[row] = Start(slot, source)
        if own is None:
            self._forget(slot)
        if source is None:
            self.computing.add(prompt)

    def rows(self, numbers: Sequence[int], starts: Sequence[int]) -> CachedRows:
        """Return what is cached of rows that take a step, and what that step caches.

        Args:
            starts: tokens of each row before its open block.
        """
        slots = [self.starts[row].slot for row in numbers]
        copies = []
        for row, slot, start in zip(numbers, slots, starts, strict=True):
            source = self.starts[row].source
            if row not in self.cached and source is not None:
                self.cached[row] = start
                if source != slot and start:
                    copies.append((source, slot, start))
        before = [self.cached.get(row, 0) for row in numbers]
        keep = [start - count for start, count in zip(starts, before, strict=True)]
        self.cached |= dict(zip(numbers, starts, strict=True))
        return CachedRows(self.store, slots, before, keep, copies, [0] * len(slots))

    def parts(
        self, numbers: Sequence[int], parts: Sequence[tuple[int, int]], lengths: Sequence[int]
    ) -> CachedRows:
        """Return what is cached of rows of a cached policy, and what their step caches.

        Args:
            parts: of each row, what all steps of its block compute: its first token and its end.
            lengths: tokens of each row.
        """
        before, keep, after = list[int](), list[int](), list[int]()
        for row, (start, end), length in zip(numbers, parts, lengths, strict=True):
            is_known = self.cached.get(row) == start
            before.append(start * is_known)
            after.append((length - end) * is_known)
            keep.append(length * (not is_known))
            self.cached[row] = start
        slots = [self.starts[row].slot for row in numbers]
        return CachedRows(self.store, slots, before, keep, [], after)

    def ran(self, rows: Sequence[int]) -> None:
        """Note that the slots of rows hold the keys of their prompts."""
        for row in rows:
            slot, prompt = self.starts[row].slot, self.prompts[row]
            self.computing.discard(prompt)
            if self.held.get(slot) != prompt:
                self.held[slot] = prompt
                self.holders.setdefault(prompt, []).append(slot)

    def end(self, rows: Sequence[int]) -> None:
        """Free the slots of finished rows."""
        for row in rows:
            self.free.append(self.starts.pop(row).slot)
            self.cached.pop(row, None)

    def _forget(self, slot: int) -> None:
        prompt = self.held.pop(slot, None)
        if prompt is not None:
            self.holders[prompt].remove(slot)


def make_slots(store: KeyStore, prompts: Sequence[Tensor], sampling: SamplingSettings) -> Slots:
    """Return the slots of an empty cache."""
    keys = [prompt.cpu().numpy().tobytes() for prompt in prompts]
    if sampling.is_cached:  # keys of a prompt depend on the completion: no two rows share them
        keys = [str(number).encode() for number in range(len(prompts))]
    return Slots(store, keys, free=list(range(store.slots))[::-1])


@dataclass
class Admission:
    """Rows that wait for their first step."""

    lengths: Sequence[int]  # R: tokens of each row
    firsts: Sequence[int]  # R: tokens of each row in its first step, the prompt included
    laters: Sequence[int]  # R: tokens of each row in any other step, at most
    budget: int  # tokens of a forward pass
    most: int  # rows of a forward pass
    slots: Slots | None
    waiting: deque[int] = field(init=False)

    def __post_init__(self):
        order = sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row])
        self.waiting = deque(order)

    def fill(self, live: Sequence[int], *, used: int, free: int) -> list[int]:
        """Take waiting rows: a fair share for each of the `free` groups, within the budget.

        Args:
            live: rows of the forward pass so far.
            used: their tokens in it, at most.
        """
        share = sum(self.lengths[row] for row in self.waiting) / free
        taken, rows, later = 0, list[int](), list[int]()
        while self.waiting and (taken < share or not rows) and len(live) + len(rows) < self.most:
            row, slots = self.waiting[0], self.slots
            needs_slot = slots is not None and row not in slots.starts
            if slots is not None and needs_slot and not slots.free:
                break
            if slots is not None and slots.prompts[row] in slots.computing:
                later.append(self.waiting.popleft())
                continue
            tokens = self._tokens(row)
            if (live or rows) and used + tokens > self.budget:
                break
            used, taken = used + tokens, taken + self.lengths[row]
            rows.append(self.waiting.popleft())
            if slots is not None and needs_slot:
                slots.start(row)
        self.waiting.extendleft(reversed(later))
        return rows

    def hold(self, live: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Return the rows that take the next step; the others wait for room in the budget.

        Args:
            live: rows after a step.
            lengths: tokens of the next step of each. Short steps come first.
        """
        taken, held, used = list[int](), list[int](), 0
        for row, length in sorted(zip(live, lengths, strict=True), key=lambda pair: pair[1]):
            has_room = not taken or used + length <= self.budget
            (taken if has_room else held).append(row)
            used += length * has_room
        self.waiting.extendleft(reversed(held))
        return taken

    def _tokens(self, row: int) -> int:
        """Return what a row needs of the budget; without a cache, in its longest step."""
        computes_prompt = self.slots is not None and not self.slots.is_known(row)
        return self.firsts[row] if computes_prompt else self.laters[row]


def admit(
    state: SamplerState,
    model: ModelSettings,
    slots: Slots | None,
    *,
    budget: int,
    most: int | None,
) -> Admission:
    """Return the admission of all rows of a sampler.

    Args:
        budget: tokens of a forward pass.
        most: rows of a forward pass; None: any.
    """
    rows = range(len(state.lengths))
    firsts = [row_end(state, row, model) for row in rows]
    laters = [step_length(state, row, slots, model) for row in rows]
    count = len(rows) if most is None else most
    return Admission(state.lengths, firsts, laters, budget, count, slots)


def pack_step(
    state: SamplerState,
    numbers: list[int],
    row: Tensor,
    column: Tensor,
    *,
    model: ModelSettings,
    slots: Slots | None,
) -> PackedRows:
    """Pack rows for their next step, without the tokens whose keys are cached.

    Args:
        row, column: [S] scored tokens, by place in `numbers` and by canvas column.
    """
    lengths = [row_end(state, number, model) for number in numbers]
    prompts = [len(state.prompts[number]) for number in numbers]
    patterns, cached = state_rows(lengths, prompts, model, state.sampling), None
    starts = [_open_block(state, number)[0] if model.has_blocks else 0 for number in numbers]
    if slots is not None and state.sampling.is_cached:
        patterns = [full(length) for length in lengths]
        cached = slots.parts(numbers, [_part(state, n, model) for n in numbers], lengths)
    elif slots is not None:
        cached = slots.rows(numbers, starts)
    if cached is not None:
        known = map(sum, zip(cached.before, cached.after, strict=True))
        lengths = [end - count for end, count in zip(lengths, known, strict=True)]
    canvas = state.canvas[on_device(numbers, row.device)]
    packed = pack_scored(
        canvas, lengths, row, column, shift=model.shift, patterns=patterns, cached=cached
    )
    return replace(packed, owners=list(zip(numbers, starts, strict=True)))


def row_end(state: SamplerState, number: int, model: ModelSettings) -> int:
    """Return the tokens of a row in its next step; a block model needs none after its block."""
    return _open_block(state, number)[1] if model.has_blocks else state.lengths[number]


def step_length(state: SamplerState, number: int, slots: Slots | None, model: ModelSettings) -> int:
    """Return the packed tokens of a row in its next step, at most; of a block model, two blocks.

    Without a cache it is the whole row: its part up to the open block grows from block to block.
    Under a cached policy it is the whole row if its block begins.
    """
    whole = state.lengths[number]
    if slots is None:
        return whole
    if not state.sampling.is_cached:
        return min(whole, 2 * state.sampling.block_length)
    start, end = _part(state, number, model)
    return end - start if slots.cached.get(number) == start else whole


def step_order(
    state: SamplerState, number: int, slots: Slots | None, model: ModelSettings
) -> tuple[int, ...]:
    """Return a key that sorts rows so that those of equal shape share an attention call."""
    end = row_end(state, number, model)
    if not state.sampling.is_cached:
        return (-end,)
    return -step_length(state, number, slots, model), -end, _part(state, number, model)[0]


def _part(state: SamplerState, number: int, model: ModelSettings) -> tuple[int, int]:
    prompt = len(state.prompts[number])
    return open_part(prompt, state.opened[number], state.sampling, shift=model.shift)


def _open_block(state: SamplerState, number: int) -> tuple[int, int]:
    return open_block(len(state.prompts[number]), state.opened[number], state.sampling)
