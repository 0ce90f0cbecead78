"""What the loops share: settings, ranks, task, tokenizer and log; and how a network samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.diffusion.sampler import SamplerContext, sample
from agrpo_megatron.megatron.engine import score_rows
from agrpo_megatron.megatron.model import MaskedDiffusionModel
from agrpo_megatron.megatron.ranks import Ranks
from agrpo_megatron.settings import SamplingSettings, Settings
from agrpo_megatron.tasks import Task
from agrpo_megatron.tokenizer import Tokenizer
from agrpo_megatron.training.log import RunLog
from agrpo_megatron.types import PackedRows, Problem, Reward, Trajectory

EVALUATION_IDS = 1 << 40  # noise indices of evaluation, far from those of training


class View(Protocol):
    """What shows a run while it runs; the terminal view is one."""

    def sft(self, metrics: dict) -> None:
        """Show one supervised iteration."""

    def rl(self, metrics: dict) -> None:
        """Show one reinforcement-learning iteration."""

    def evaluation(self, metrics: dict) -> None:
        """Show one evaluation."""

    def note(self, text: str) -> None:
        """Say something."""

    def warn(self, text: str) -> None:
        """Say something alarming."""


@dataclass(frozen=True)
class Session:
    """One run on this rank."""

    settings: Settings
    ranks: Ranks
    task: Task
    tokenizer: Tokenizer
    vocab: Vocabulary
    log: RunLog
    view: View

    @property
    def mask_id(self) -> int:
        """Return the mask token's id."""
        assert self.settings.model.mask_token_id is not None
        return self.settings.model.mask_token_id

    @property
    def eos_id(self) -> int:
        """Return the end-of-text id."""
        assert self.settings.model.eos_token_id is not None
        return self.settings.model.eos_token_id

    def my_share(self, count: int) -> list[int]:
        """Return which of `count` items this data-parallel rank works on: neighbours."""
        rank, size = self.ranks.data_rank, self.ranks.data_size
        return list(range(count * rank // size, count * (rank + 1) // size))


def encode_prompts(session: Session, prompts: Sequence[str]) -> list[Tensor]:
    """Return the ids of each prompt, int64."""
    device, encode = session.ranks.device, session.tokenizer.encode
    return [torch.tensor(encode(text), dtype=torch.int64, device=device) for text in prompts]


def task_prompts(session: Session, problems: Sequence[Problem]) -> list[str]:
    """Return the prompt of each problem."""
    return [session.task.prompt(problem) for problem in problems]


def sample_prompts(
    session: Session,
    network: MaskedDiffusionModel,
    prompts: Sequence[str],
    rollout_ids: Tensor,
    *,
    sampling: SamplingSettings,
    weights_version: int = 0,
) -> tuple[Trajectory, int]:
    """Sample one completion per prompt; also returns the tokens that went through the network."""
    network.eval()
    tokens = 0

    def score(rows: PackedRows) -> Tensor:
        nonlocal tokens
        tokens += len(rows.tokens)
        return score_rows(network, rows)

    context = SamplerContext(
        score=score,
        vocab=session.vocab,
        mask_id=session.mask_id,
        eos_id=session.eos_id,
        seed=session.settings.run.seed,
        token_budget=session.settings.train.token_budget,
    )
    trajectory = sample(
        encode_prompts(session, prompts),
        rollout_ids,
        context=context,
        sampling=sampling,
        weights_version=weights_version,
    )
    return trajectory, tokens


def grade(session: Session, problems: Sequence[Problem], trajectory: Trajectory) -> list[Reward]:
    """Grade each completion, cut at its end-of-text."""
    texts = [session.tokenizer.decode(ids) for ids in trajectory.tokens.tolist()]
    return [session.task.reward(p, text) for p, text in zip(problems, texts, strict=True)]


def sample_records(
    session: Session,
    problems: Sequence[Problem],
    trajectory: Trajectory,
    rewards: Sequence[Reward],
) -> list[dict]:
    """Describe the first completions for samples.jsonl, `logging.samples` of them."""
    records = []
    for row in range(min(session.settings.logging.samples, len(problems))):
        ids = trajectory.tokens[row].tolist()
        records.append(
            {
                "prompt": session.task.prompt(problems[row]),
                "completion": session.tokenizer.decode(ids),
                "pieces": session.tokenizer.pieces(ids),
                "unmask_step": trajectory.unmask_step[row].tolist(),
                "num_steps": int(trajectory.num_steps[row]),
                "reward": rewards[row].score,
                "correct": rewards[row].correct,
                "solution": problems[row].solution,
            }
        )
    return records


def pick_problems(count: int, *, batch: int, iteration: int, seed: int) -> list[int]:
    """Return the problem indices of an iteration (from 0): epochs, each in its own order."""
    picked = []
    for place in range(iteration * batch, (iteration + 1) * batch):
        epoch, offset = divmod(place, count)
        picked.append(_epoch_order(count, epoch, seed)[offset])
    return picked


_orders: dict[tuple[int, int, int], list[int]] = {}


def _epoch_order(count: int, epoch: int, seed: int) -> list[int]:
    """Return one epoch's order; the last one asked for is kept."""
    key = (count, epoch, seed)
    if key not in _orders:
        _orders.clear()
        chance = noise.noise_key(seed, noise.PROBLEMS, torch.tensor(epoch), torch.arange(count))
        _orders[key] = noise.uniform(chance).argsort().tolist()
    return _orders[key]


def sum_over_ranks(session: Session, sums: dict[str, float]) -> dict[str, float]:
    """Add each value over the data-parallel ranks; called by every rank.

    A rank without rollouts, or whose rewards lack a part, does not know every key.
    """
    known: list[list[str]] = [[] for _ in range(session.ranks.data_size)]
    dist.all_gather_object(known, list(sums), group=session.ranks.data_group)
    names = list(dict.fromkeys(name for names in known for name in names))
    values = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)
    values = values.to(session.ranks.device)
    dist.all_reduce(values, group=session.ranks.data_group)
    return dict(zip(names, values.tolist(), strict=True))


def reward_sums(rewards: Sequence[Reward]) -> dict[str, float]:
    """Return sums over rollouts of score, its square, correctness and the named parts."""
    names = sorted({name for reward in rewards for name in reward.parts})
    sums = {
        "count": float(len(rewards)),
        "score": sum(r.score for r in rewards),
        "score_squared": sum(r.score**2 for r in rewards),
        "correct": float(sum(r.correct for r in rewards)),
    }
    return sums | {f"part {n}": sum(r.parts.get(n, 0.0) for r in rewards) for n in names}


def reward_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Turn the sums of all ranks into metrics."""
    count = max(1.0, sums["count"])
    mean = sums["score"] / count
    variance = max(0.0, sums["score_squared"] / count - mean**2)
    parts = {
        f"reward/{name.removeprefix('part ')}": value / count
        for name, value in sums.items()
        if name.startswith("part ")
    }
    return {
        "reward/mean": mean,
        "reward/std": variance**0.5,
        "accuracy": sums["correct"] / count,
        **parts,
    }
