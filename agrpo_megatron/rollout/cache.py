"""Rollouts on disk until a checkpoint has learned from them: a restart samples none again.

One file for each round of an iteration: what was sampled and how it was graded. Under the same
settings the same is sampled again, so a file is right for whichever attempt of its run comes across
it; one of other settings, or of more or fewer rollouts than are asked for, is not taken.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.megatron.parallel import Ranks
from agrpo_megatron.resilience.stop import Stop
from agrpo_megatron.rollout.partial import SUFFIX, WRITING, PartialRollout, progress_in
from agrpo_megatron.trajectories import moved
from agrpo_megatron.types import Answers, Reward, Trajectory

TENSORS = ("tokens", "unmask_step", "logprobs", "entropies", "num_steps", "rollout_ids")
DIGITS = 6  # of a round's number


def sampling_number(iteration: int, resampling: int, algorithm: AlgorithmSettings) -> int:
    """Count the rounds of sampling through a run, also those that may not be needed.

    Args:
        iteration: those finished before.
        resampling: 0 is the first round of the iteration.
    """
    return iteration * (1 + algorithm.resample_rounds) + resampling


def round_name(number: int) -> str:
    """Return the name of a round's files."""
    return f"{number:0{DIGITS}d}"


class RolloutBank:
    """The rollouts of a run since its last checkpoint; every call is made by every rank.

    Args:
        folder: None keeps nothing.
        run: says which settings and problems the rollouts are of.
        check: called before files appear or go; raises where this attempt must not touch them.
    """

    def __init__(
        self,
        folder: Path | None,
        ranks: Ranks,
        *,
        run: str,
        check: Callable[[], None] = lambda: None,
    ):
        self._folder, self._ranks, self._run, self._check = folder, ranks, run, check
        if folder is not None and ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{WRITING}"):
                left.unlink(missing_ok=True)

    def find(
        self, number: int, rollout_ids: Tensor, *, sampling: SamplingSettings
    ) -> Answers | None:
        """Return what a round sampled in an earlier attempt, if just that is on disk."""
        path = self._path(number)
        found = None if path is None or not path.exists() else _read(path, sampling, self._run)
        if found and not torch.equal(found.trajectory.rollout_ids, rollout_ids.cpu()):
            found = None
        # Every rank must go the same way, whatever its view of the disk.
        count = torch.tensor(int(found is not None), device=self._ranks.device)
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MIN)
        if found is None or not int(count):
            return None
        return Answers(
            moved(found.trajectory, self._ranks.device),
            found.rewards,
            found.tokens,
            found.bubble,
            found.seconds,
        )

    def keep(self, number: int, answers: Answers) -> None:
        """Write what a round sampled; it appears when it is whole, and its parts go."""
        path = self._path(number)
        if path is None or not self._ranks.is_main:
            return
        writing = path.with_suffix(f".{secrets.token_hex(4)}{WRITING}")
        _write(writing, answers, self._run)
        self._check()
        writing.rename(path)
        for part in path.parent.glob(f"{path.stem}-*{SUFFIX}"):
            part.unlink()

    def partial(
        self, name: str, rollout_ids: Tensor, *, ranks: Ranks, stop: Stop
    ) -> PartialRollout:
        """Return what ends and keeps one replica's part of a rollout, whole or not.

        Args:
            rollout_ids: of that part.
            ranks: the layout that samples.
        """
        path = None if self._folder is None else self._folder / name
        return PartialRollout(
            path, rollout_ids, run=self._run, ranks=ranks, stop=stop, check=self._check
        )

    def forget(self, number: int) -> None:
        """Remove the rollouts of rounds before this one; a checkpoint has learned from them.

        So it has of evaluations: those come before it.
        """
        self._remove(lambda round_number: round_number < number)

    def drop(self, number: int) -> None:
        """Remove the rollouts of rounds from this one on: they may be spoilt."""
        self._remove(lambda round_number: round_number >= number)
        torch.distributed.barrier()  # no rank finds what is about to go

    def progress(self) -> list[str]:
        """Describe what is kept, so that a change shows that something was sampled."""
        if self._folder is None:
            return []
        whole = [path.name for path in self._folder.glob("*.safetensors")]
        parts = self._folder.glob(f"*{SUFFIX}")
        said = ("{}: {} rows, {} steps".format(path.name, *progress_in(path)) for path in parts)
        return sorted([*whole, *said])

    def _remove(self, is_chosen: Callable[[int], bool]) -> None:
        """Remove the files of some rounds, and of evaluations."""
        if self._folder is None or not self._ranks.is_main:
            return
        self._check()
        for path in (*self._folder.glob("*.safetensors"), *self._folder.glob(f"*{SUFFIX}")):
            first = path.name[:DIGITS]
            if not first.isdigit() or is_chosen(int(first)):
                path.unlink()

    def _path(self, number: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{round_name(number)}.safetensors"


def _write(path: Path, answers: Answers, run: str) -> None:
    trajectory = moved(answers.trajectory, "cpu")
    tensors = {name: getattr(trajectory, name).contiguous() for name in TENSORS}
    if trajectory.support_ids is not None:
        tensors["support_ids"] = trajectory.support_ids.contiguous()
    lengths = [len(prompt) for prompt in trajectory.prompts]
    tensors["prompts"] = torch.cat(trajectory.prompts)
    tensors["prompt_lengths"] = torch.tensor(lengths)
    notes = {
        "run": run,
        "rewards": [asdict(reward) for reward in answers.rewards],
        "tokens": answers.tokens,
        "bubble": answers.bubble,
        "seconds": answers.seconds,
        "weights_version": trajectory.weights_version,
    }
    save_file(tensors, path, metadata={"notes": json.dumps(notes)})


def _read(path: Path, sampling: SamplingSettings, run: str) -> Answers | None:
    """Read a file; None where it is damaged or of other settings: sampling again is possible."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = json.loads(file.metadata()["notes"])
        if notes["run"] != run:
            return None
        lengths = tensors["prompt_lengths"].tolist()
        trajectory = Trajectory(
            prompts=tuple(tensors["prompts"].split(lengths)),
            support_ids=tensors.get("support_ids"),
            sampling=sampling,
            weights_version=notes["weights_version"],
            **{name: tensors[name] for name in TENSORS},
        )
        rewards = [Reward(**reward) for reward in notes["rewards"]]
        return Answers(trajectory, rewards, notes["tokens"], notes["bubble"], notes["seconds"])
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return None
