"""The rollout cache: rollouts on disk until a checkpoint includes their updates.

The cache stores a completion as soon as it is complete, and a sampling round once it is graded.
A restart reads them and samples only the missing completions: the noise of a completion depends
only on its rollout id, so a repeated sample is bit-identical. Files name the run (a digest of its
settings and problems); damaged files and files of another run are ignored.
"""

import json
import secrets
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.megatron.parallel import Ranks, gather_objects
from agrpo_megatron.runs.stored_rollouts import DIGITS, ROUND, UNREADABLE, round_path
from agrpo_megatron.trajectories import join, moved, select, tensors
from agrpo_megatron.types import GradedRollouts, Reward, Trajectory

PART, WRITING = ".part", ".writing"
# Limit of the time for copying completions to the host and writing them, as a share of the rollout.
SHARE = 0.02
NOTED = ("tokens", "bubble", "seconds")  # fields of a graded round, besides its rewards


def find_round(
    path: Path,
    rollout_ids: Tensor,
    ranks: Ranks,
    *,
    runs: Collection[str],
    sampling: SamplingSettings,
) -> GradedRollouts | None:
    """Return a graded round that a run stored, or None unless all ranks can read it; every rank.

    Args:
        runs: the digests of settings and problems that the file may name.
    """
    found = None
    with suppress(*UNREADABLE):
        trajectory, notes = _read(path, runs, sampling)
        rewards = [Reward(**reward) for reward in notes["rewards"]]
        if torch.equal(trajectory.rollout_ids, rollout_ids.cpu()):
            noted = {name: notes[name] for name in NOTED}
            found = GradedRollouts(trajectory, rewards, **noted, passes=notes.get("passes", 0))
    # All ranks must agree, even if they see different files.
    if not all(gather_objects(found is not None)):
        return None
    assert found is not None
    return replace(found, trajectory=moved(found.trajectory, ranks.device))


class NoCache:
    """A cache that keeps nothing: no round, no completion."""

    run = None

    def find(self, *_: object, **__: object) -> None:
        """Do nothing, and return None."""

    find_completions = writer = keep = forget = drop = find

    def progress(self) -> list[str]:
        """Return nothing."""
        return []


class RolloutCache:
    """The rollouts of a run since its last checkpoint; every call is made by every rank.

    Args:
        run: digest of the settings and problems of the rollouts.
        keeps_all: whether graded rounds stay when a checkpoint includes their updates.
        check: called before files are written or removed; raises if this attempt must not do so.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        run: str,
        keeps_all: bool = False,
        check: Callable[[], None] = lambda: None,
    ):
        self._folder, self._ranks, self.run, self._check = folder, ranks, run, check
        self._keeps_all = keeps_all
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{WRITING}"):
                left.unlink(missing_ok=True)

    def find(
        self,
        number: int,
        rollout_ids: Tensor,
        *,
        sampling: SamplingSettings,
        run: str | None = None,
    ) -> GradedRollouts | None:
        """Return the graded round of an earlier attempt, if it is on disk.

        Args:
            run: the digest that the file names; None: that of this run.
        """
        path, runs = round_path(self._folder, number), (run or self.run,)
        return find_round(path, rollout_ids, self._ranks, runs=runs, sampling=sampling)

    def find_completions(
        self, name: str, rollout_ids: Tensor, *, sampling: SamplingSettings, run: str | None = None
    ) -> Trajectory | None:
        """Return the completions of a rollout by earlier attempts, in the order of ids.

        Args:
            run: the digest that the files name; None: that of this run.
        """
        kept: list[Trajectory] = []
        for path in self._parts(name):
            with suppress(*UNREADABLE):
                kept.append(_read(path, (run or self.run,), sampling)[0])
        wanted = rollout_ids.tolist()
        places = {n: i for i, n in enumerate(n for p in kept for n in p.rollout_ids.tolist())}
        seen_by_all = set.intersection(*gather_objects(set(places) & set(wanted)))
        if not seen_by_all:
            return None
        order = [places[number] for number in wanted if number in seen_by_all]
        return moved(select(join(kept), torch.tensor(order)), self._ranks.device)

    def writer(self, name: str, ranks: Ranks) -> "CompletionWriter | None":
        """Return the writer of a replica's completions; None on ranks that write nothing.

        Args:
            ranks: the rollout layout.
        """
        if not ranks.speaks_for_replica:
            return None

        def write(part: Trajectory) -> None:
            self._write(self._folder / f"{name}-{secrets.token_hex(4)}{PART}", part)

        return CompletionWriter(write)

    def keep(self, number: int, rollouts: GradedRollouts, *, run: str | None = None) -> None:
        """Write a graded round and remove the files of its completions.

        Args:
            run: the digest that the file names, as in `find`.
        """
        if not self._ranks.is_main:
            return
        path = round_path(self._folder, number)
        notes = {name: getattr(rollouts, name) for name in (*NOTED, "passes")}
        rewards = [asdict(reward) for reward in rollouts.rewards]
        notes |= {"run": run or self.run, "rewards": rewards}
        self._write(path, moved(rollouts.trajectory, "cpu"), **notes)
        for part in self._parts(path.stem):
            part.unlink()

    def forget(self, number: int) -> None:
        """Remove evaluations, and rounds before this one: a checkpoint includes their updates."""
        first = 0 if self._keeps_all else number
        self._remove(lambda round_number: round_number < first)

    def drop(self, number: int) -> None:
        """Remove evaluations, and rounds from this one on: they may be invalid."""
        self._remove(lambda round_number: round_number >= number)
        torch.distributed.barrier()  # no rank finds a file that is about to be removed

    def progress(self) -> list[str]:
        """Return the names of all files, which change with every new sample."""
        return sorted(path.name for path in self._folder.iterdir())

    def _write(self, path: Path, trajectory: Trajectory, **notes: Any) -> None:
        """Write a trajectory with notes; the file appears only when complete."""
        stored = {name: tensor.contiguous() for name, tensor in tensors(trajectory).items()}
        stored["prompts"] = torch.cat(trajectory.prompts)
        stored["prompt_lengths"] = torch.tensor([len(prompt) for prompt in trajectory.prompts])
        notes = {"run": self.run, "weights_version": trajectory.weights_version, **notes}
        writing = path.with_name(f"{path.stem}.{secrets.token_hex(4)}{WRITING}")
        save_file(stored, writing, metadata={"notes": json.dumps(notes)})
        self._check()
        writing.replace(path)

    def _remove(self, is_chosen: Callable[[int], bool]) -> None:
        if not self._ranks.is_main:
            return
        self._check()
        for path in (*self._folder.glob(f"*{ROUND}"), *self._parts("")):
            first = path.name[:DIGITS]
            if not first.isdigit() or is_chosen(int(first)):
                path.unlink()

    def _parts(self, name: str) -> list[Path]:
        return sorted(self._folder.glob(f"{name}*{PART}"))


class CompletionWriter:
    """Writes one replica's completions, several per file if that is slow.

    Completions wait on their device, so the copy to the host is part of the writing. Almost all
    bytes are support ids: 4 * top_k a token, and 28 for the rest; or drawn tokens, where recorded.
    """

    def __init__(self, write: Callable[[Trajectory], None]):
        self._write = write
        self._waiting: list[Trajectory] = []
        self._free_at = 0.0  # earliest time of the next write within SHARE

    def add(self, part: Trajectory) -> None:
        """Write complete rows: now, or together with later rows."""
        self._waiting.append(part)
        if time.monotonic() >= self._free_at:
            self.flush()

    def flush(self) -> None:
        """Write all pending rows."""
        if not self._waiting:
            return
        started = time.monotonic()
        part, self._waiting = join(self._waiting), []
        self._write(moved(part, "cpu"))
        now = time.monotonic()
        self._free_at = now + (now - started) / SHARE


def _read(
    path: Path, runs: Collection[str], sampling: SamplingSettings
) -> tuple[Trajectory, dict[str, Any]]:
    """Read a file of the cache; raises one of `UNREADABLE` if it is damaged or another run's."""
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        notes = json.loads(file.metadata()["notes"])
    if notes["run"] not in runs:
        raise ValueError("the file belongs to another run")
    lengths = stored.pop("prompt_lengths").tolist()
    prompts = tuple(stored.pop("prompts").split(lengths))
    version = notes["weights_version"]
    stored.setdefault("support_ids", None)
    # Files of a version that did not record them: 1 marks no step as free of gradient.
    stored.setdefault("spreads", torch.ones_like(stored["entropies"]))
    return Trajectory(prompts, sampling=sampling, weights_version=version, **stored), notes
