"""The directory of an evaluation: its description, every completion, and the results.

The main rank writes it. Completions are appended batch by batch, so that a killed evaluation
resumes after its last complete batch.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrpo_megatron.config.schema import flatten
from agrpo_megatron.evaluation.grid import EVALUATION, RESULTS
from agrpo_megatron.runs.files import write_whole

COMPLETIONS = "completions.jsonl"
# Keys of a completion that a resumed evaluation reads.
NEEDED = {"task", "key", "sample", "score", "correct", "parts", "failure"}
NEEDED |= {"num_steps", "completion_tokens", "flops"}
PARTIAL = f".{EVALUATION}"  # left by an evaluation that was killed as it began
OTHER = "use another --output or --name, or --restart to start it again"

Line = dict[str, Any]


@dataclass(frozen=True)
class ResultStore:
    """An evaluation's directory; only the main rank calls the methods that write."""

    directory: Path

    def is_begun(self) -> bool:
        """Return whether the directory holds an evaluation.

        Raises:
            ValueError: the directory holds other files.
        """
        if (self.directory / EVALUATION).exists():
            return True
        if self.directory.exists() and (
            not self.directory.is_dir() or any(p.name != PARTIAL for p in self.directory.iterdir())
        ):
            raise ValueError(
                f"{self.directory} is not empty and holds no evaluation; use another --output"
            )
        return False

    def stored(self) -> dict[str, Any] | None:
        """Return the description of an earlier attempt; None for a new directory.

        Raises:
            ValueError: the directory holds something else.
        """
        if not self.is_begun():
            return None
        path = self.directory / EVALUATION
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{path} is not JSON; {OTHER}") from None

    def check(self, evaluation: dict[str, Any]) -> None:
        """Compare the description of an earlier attempt with this one.

        Raises:
            ValueError: they differ; the message names the first difference.
        """
        there = self.stored()
        if there is None:
            return
        old = flatten(there.get("evaluates", {}))
        new = flatten(json.loads(json.dumps(evaluation["evaluates"])))
        for key in [*new, *old]:
            if old.get(key) != new.get(key):
                raise ValueError(
                    f"{self.directory} holds an evaluation with {key}={old.get(key)}, not "
                    f"{new.get(key)}; {OTHER}"
                )

    def begin(self, evaluation: dict[str, Any]) -> None:
        """Write the description, unless an earlier attempt wrote it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / EVALUATION).exists():
            write_whole(self.directory / EVALUATION, json.dumps(evaluation, indent=2) + "\n")

    def results(self) -> dict[str, Any] | None:
        """Return the results so far, or None."""
        path = self.directory / RESULTS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def lines(self) -> list[Line]:
        """Return the stored completions; an incomplete last line is left out.

        Raises:
            ValueError: a complete line was changed.
        """
        path = self.directory / COMPLETIONS
        if not path.exists():
            return []
        *whole, _ = path.read_bytes().split(b"\n")
        found = []
        for number, text in enumerate(whole, start=1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if not isinstance(line, dict) or not line.keys() >= NEEDED:
                raise self.changed(number)
            found.append(line)
        return found

    def changed(self, number: int) -> ValueError:
        """Return the error for completions that were changed, from a line on."""
        return ValueError(
            f"{self.directory / COMPLETIONS} was changed from line {number} on; --restart starts "
            "it again"
        )

    def keep(self, count: int) -> None:
        """Truncate the completions to the first `count` lines."""
        path = self.directory / COMPLETIONS
        if not path.exists():
            return
        with path.open("rb+") as stream:
            for _ in range(count):
                stream.readline()
            stream.truncate(stream.tell())

    def append(self, lines: Sequence[Line]) -> None:
        """Append completions; they are on disk when this returns."""
        with (self.directory / COMPLETIONS).open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())

    def write(self, results: dict[str, Any]) -> None:
        """Write the results so far, atomically."""
        write_whole(self.directory / RESULTS, json.dumps(results, indent=2) + "\n")
