"""Base class of tasks whose problems come from files or data sets."""

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from agrpo_megatron.tasks import data, row_sources
from agrpo_megatron.tasks.base import Split, Splits, Task
from agrpo_megatron.tasks.data import Row, without_leaks
from agrpo_megatron.types import Problem

NONE = "none"  # a source without problems


class FileTask(Task):
    """A task that reads its problems; options `train` and `eval` name the sources."""

    options: Any
    selection_fix: ClassVar[str] = "give another file"  # to select other problems

    def load(self) -> Splits:
        """Return the problems of both splits, without leaks."""
        # Files first: a wrong one fails before any download.
        order: list[Split] = sorted(("eval", "train"), key=self._is_remote)
        read = {split: self._read(split) for split in order}
        filled = self.fill(read["train"], read["eval"])
        train, held_out = filled["train"], filled["eval"]
        if read["train"] and read["eval"]:  # `fill` makes problems without leaks
            train, notes = without_leaks(train, held_out, task=self, holder=self, name=self.name)
            self.notes += notes
        return {"eval": self._subset("eval", held_out), "train": self._subset("train", train)}

    def fill(self, train: list[Problem] | None, held_out: list[Problem] | None) -> Splits:
        """Return both splits; make those without a source."""
        assert train is not None and held_out is not None
        return {"train": train, "eval": held_out}

    def begin(self, rows: Sequence[tuple[int, Row]], *, key: str, source: str) -> None:
        """Look at all rows of a source before problems are made of them."""

    def make_problem(self, row: Row) -> Problem:
        """Read one row; its field `answer` is None if the row lacks one."""
        raise NotImplementedError

    def source(self, split: Split) -> str | None:
        """Return the file or data set of a split; None if its problems are made otherwise."""
        return self.options.train if split == "train" else self.options.eval

    def pick(self, split: Split, rows: list[tuple[int, Row]]) -> list[tuple[int, Row]]:
        """Return the rows of a source that are read; by default all."""
        return rows

    def select(self, split: Split, problems: list[Problem]) -> list[Problem]:
        """Return the problems of a source that are used; by default all."""
        return problems

    def _is_remote(self, split: Split) -> bool:
        source = self.source(split)
        return source not in (None, NONE) and not row_sources.is_local(source)

    def _read(self, split: Split) -> list[Problem] | None:
        """Return the problems of a split's source; None without one."""
        source = self.source(split)
        if source is None:
            return None
        if source == NONE and split == "train":
            return []
        key = f"task.options.{split}"
        rows = row_sources.read_rows(source, key=key, split=row_sources.HUB_SPLITS[split])
        rows = self.pick(split, rows)
        self.begin(rows, key=key, source=source)
        found = data.convert_rows(rows, self.make_problem, key=key, source=source)
        answered = [(row, p) for row, p in found if p.fields.get("answer", "") is not None]
        if not answered:
            raise ValueError(f"{key}={source}: no row has an answer; give another file")
        problems, notes = data.without_repeats(answered)
        left_out = len(rows) - len(answered)
        notes = [f"{left_out} rows without an answer left out"] * (left_out > 0) + notes
        selected = self.select(split, problems)
        if not selected:
            raise ValueError(
                f"{key}={source}: the options select none of its problems; {self.selection_fix}"
            )
        if len(selected) < len(problems):
            notes.append(f"{len(problems) - len(selected)} problems of another kind left out")
        self.notes += [f"{key}={source}: {note}" for note in notes]
        return selected

    def _subset(self, split: Split, problems: Sequence[Problem]) -> Sequence[Problem]:
        """Draw the number of problems in the settings, in their order."""
        asked = getattr(self.settings, f"{split}_problems")
        if asked is not None and asked < len(problems):
            chance = random.Random(f"{self.name} {split} {self.settings.seed}")
            kept = sorted(chance.sample(range(len(problems)), asked))
            problems = [problems[place] for place in kept]
        return problems
