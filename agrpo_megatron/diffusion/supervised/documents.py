"""Texts that share a row and do not see each other: each becomes a packed row of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from agrpo_megatron.diffusion.packing import on_device


@dataclass(frozen=True)
class Parts:
    """Parts of rows that have tokens to score: each has a prompt and a response."""

    prompts: list[Tensor]
    lengths: Tensor  # [P] int64, on the host: tokens of each response
    row: Tensor  # [P] int64, the row that it is of
    first: Tensor  # [P] int64, the column of its first token in the row's response

    def of(self, table: Tensor) -> Tensor:
        """Return values of the parts [P, longest] from those of rows [n, C], zeros after a part."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        columns = torch.arange(longest, device=table.device)
        inside = columns < self.lengths.to(table.device)[:, None]
        wanted = (self.first[:, None] + columns).clamp(max=table.shape[1] - 1)
        return table[self.row[:, None], wanted] * inside


def parts_of(
    prompts: Sequence[Tensor], responses: Tensor, lengths: Tensor, cuts: Sequence[Sequence[int]]
) -> Parts:
    """Return the parts of rows; the first token of each is its context.

    Args:
        responses: [n, C], after the prompts.
        lengths: [n] tokens of each response, on the host.
        cuts: places of each row, counted from its prompt, at which another text begins.
    """
    device, kept, found = responses.device, list[Tensor](), list[tuple[int, int, int]]()
    for row, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        before, whole = len(prompt), torch.cat([prompt, responses[row, :length]])
        for start, end in pairwise([0, *cuts[row], len(whole)]):
            first = max(start + 1, before)
            if first < end:
                kept.append(whole[start:first])
                found.append((row, first - before, end - first))
    table = torch.tensor(found, dtype=torch.int64).reshape(-1, 3)
    row, first = (on_device(table[:, place].tolist(), device) for place in (0, 1))
    return Parts(kept, table[:, 2], row, first)
