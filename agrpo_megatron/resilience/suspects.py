"""Who of the ranks hangs, by where each stands."""

import itertools
import json
import linecache
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

SHOWN = 12  # innermost frames of a stack that are shown
NAMED = 8  # ranks of many that are named


@dataclass(frozen=True)
class Stand:
    """Where a rank's main thread stands."""

    section: str
    waits: bool  # for other ranks
    stack: tuple[str, ...]  # innermost first

    @property
    def place(self) -> str:
        """Return the innermost frame."""
        return self.stack[0]

    def to_json(self) -> str:
        """Write it for another rank."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Stand":
        """Read what another rank wrote."""
        read = json.loads(text)
        return cls(read["section"], read["waits"], tuple(read["stack"]))


def stand_of(frame: FrameType, *, section: str) -> Stand:
    """Tell where a thread stands, by its innermost frame."""
    frames = itertools.islice(traceback.walk_stack(frame), SHOWN)
    stack = tuple(
        f"{_short(link.f_code.co_filename)}:{line} {link.f_code.co_name}" for link, line in frames
    )
    return Stand(section, _waits(frame), stack)


def culprits(stands: Mapping[int, Stand | None]) -> list[int]:
    """Return the ranks that hang: those silent, else those that do not wait for others.

    Where several do not wait, those that stand where the fewest do; none where all wait.
    """
    silent = [rank for rank, stand in stands.items() if stand is None]
    if silent:
        return silent
    busy = {rank: stand.place for rank, stand in stands.items() if stand and not stand.waits}
    counts = Counter(busy.values())
    fewest = min(counts.values(), default=0)
    return [rank for rank, place in busy.items() if counts[place] == fewest]


def describe(
    guilty: list[int], stands: Mapping[int, Stand | None], *, asker: int, section: str
) -> tuple[str, str]:
    """Return the verdict in a few words, and the whole report.

    Args:
        section: what is open on the rank that asked.
    """
    if not guilty:
        failure = f"all ranks wait for each other in {section} of rank {asker}"
        where = [f"  rank {rank}: {stand.place}" for rank, stand in stands.items() if stand]
        causes = "a collective that they do not agree on, or a broken link?"
        return failure, "\n".join([f"{failure}: {causes}", *where[:NAMED]])
    first = stands[guilty[0]]
    names = ", ".join(map(str, guilty[:NAMED])) + (", ..." if len(guilty) > NAMED else "")
    who = f"rank {names} hangs" if len(guilty) == 1 else f"ranks {names} hang"
    if first is None:
        failure = f"{who} in {section} of rank {asker}, without an answer"
        causes = "stopped, holding Python's lock in native code, or its node is gone"
        return failure, f"{failure}: {causes}"
    failure = f"{who} in {first.section}, at {first.place}"
    stack = [f"  {place}" for place in first.stack]
    return failure, "\n".join([f"{who} in {first.section}; its stack, innermost first:", *stack])


def _waits(frame: FrameType) -> bool:
    """Say whether a frame waits for other ranks: in torch.distributed, or for a handle of it."""
    path = Path(frame.f_code.co_filename)
    if path.parent.name == "distributed" and path.parent.parent.name == "torch":
        return True
    return ".wait(" in linecache.getline(str(path), frame.f_lineno) and path.stem != "threading"


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-3:])
