"""A score function without weights: logits are a hash of the packed row they belong to.

Any difference in a row, however small, changes all its logits; the other rows of the batch cannot.
So whatever agrees here agrees for every model that treats rows alone.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.draw import LogitsForward
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.diffusion.sampler import SamplerContext
from agrpo_megatron.types import PackedRows

SIZE, PADDED, MASK, EOS = 20, 24, 19, 3  # ids 20 .. 23 are vocabulary padding


@dataclass
class HashedModel:
    """Logits by hash, with a wish for end-of-text and a strong one for what must not be drawn."""

    scale: float = 4.0
    eos_bonus: float = 4.0
    forbidden_bonus: float = 50.0  # on the mask token and the padding
    calls: list = field(default_factory=list)  # per call: [(row tokens, scored places)]

    def __call__(self, rows: PackedRows) -> Tensor:
        starts, ends = rows.cu_seqlens[:-1].tolist(), rows.cu_seqlens[1:].tolist()
        seen = []
        for start, end in zip(starts, ends, strict=True):
            inside = rows.scored[(rows.scored >= start) & (rows.scored < end)]
            seen.append((tuple(rows.tokens[start:end].tolist()), tuple((inside - start).tolist())))
        self.calls.append(seen)
        return self.logits(rows)

    def logits(self, rows: PackedRows) -> Tensor:
        lengths = rows.cu_seqlens.diff().long()
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        place = torch.arange(len(rows.tokens)) - rows.cu_seqlens[:-1].long()[row]
        content = torch.zeros(len(lengths), dtype=torch.int64)
        content.index_add_(0, row, noise.noise_key(77, 0, place, rows.tokens))
        key = noise.noise_key(78, 0, content[row[rows.scored]], place[rows.scored])
        ids = torch.arange(PADDED)
        logits = self.scale * noise.uniform(noise.fold(key[:, None], ids))
        logits[:, EOS] += self.eos_bonus
        logits[:, MASK:] += self.forbidden_bonus
        return logits.float()

    def context(self, *, seed: int = 0, token_budget: int = 64, forbid: bool = True):
        vocab = Vocabulary(SIZE, forbidden=(MASK,) if forbid else ())
        return SamplerContext(LogitsForward(self), vocab, MASK, EOS, seed, token_budget)


def prompts_of(count: int) -> list[Tensor]:
    """Return prompts of 1 to 5 tokens, all different: the first token counts."""
    return [torch.tensor([100 + r, *range(4, 4 + r % 5)]) for r in range(count)]


def states_by_rollout(model: HashedModel, prompts: list[Tensor]):
    """Return per prompt, in order of the steps: (completion state, scored completion places)."""
    seen: list[list] = [[] for _ in prompts]
    for call in model.calls:
        for tokens, scored in call:
            rollout = tokens[0] - 100
            length = len(prompts[rollout])
            assert tokens[:length] == tuple(prompts[rollout].tolist())
            seen[rollout].append((tokens[length:], tuple(j - length for j in scored)))
    return seen


# Every unmasking rule, with and without threshold, truncation and a remainder in the schedule.
SAMPLINGS = (
    {
        f"{unmasking}, {name}": SamplingSettings(unmasking=unmasking, **options)
        for unmasking in ("random", "low_confidence", "entropy", "leftmost")
        for name, options in {
            "one token a step": {
                "completion_length": 8,
                "block_length": 4,
                "denoising_steps": 8,
            },
            "remainder": {"completion_length": 10, "block_length": 5, "denoising_steps": 6},
            "threshold": {
                "completion_length": 9,
                "block_length": 3,
                "denoising_steps": 9,
                "threshold": 0.3,
            },
            "top-k": {
                "completion_length": 8,
                "block_length": 2,
                "denoising_steps": 8,
                "top_k": 5,
                "temperature": 0.7,
            },
            "top-p and threshold": {
                "completion_length": 8,
                "block_length": 2,
                "denoising_steps": 4,
                "top_p": 0.8,
                "threshold": 0.4,
                "confidence": "untempered",
            },
            "no early end, top-k and top-p": {
                "completion_length": 6,
                "block_length": 2,
                "denoising_steps": 3,
                "top_k": 6,
                "top_p": 0.9,
                "early_end": False,
            },
            "greedy": {
                "completion_length": 8,
                "block_length": 2,
                "denoising_steps": 4,
                "temperature": 0.0,
            },
        }.items()
    }
    | {
        f"{unmasking}, all drawn tokens": SamplingSettings(
            completion_length=10,
            block_length=5,
            denoising_steps=6,
            unmasking=unmasking,
            record_drawn=True,
        )
        for unmasking in ("low_confidence", "margin")
    }
    | {
        "entropy, drawn positions": SamplingSettings(
            completion_length=10,
            block_length=5,
            denoising_steps=6,
            unmasking="entropy",
            position_temperature=0.5,
        )
    }
)
