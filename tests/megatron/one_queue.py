"""The order of messages between ranks, played as the worst devices would.

- A device does one thing after another, as with one hardware queue.
- A message between devices lasts until both sides are in it, however small it is. This includes
  the channel that both sides open at their first message.
- The host waits for every operation of its device.

A GPU waits less: it holds small messages, has several queues, and the host runs ahead. All of this
only lets more operations start, so a program that ends here ends there.
"""

from collections import Counter
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A message of a device."""

    way: str  # send or receive
    peer: int
    channel: str
    size: int  # elements


class Step(NamedTuple):
    """What a rank does next; it continues when this has ended.

    Kinds: `exchange`, messages of devices in one group; `meet`, a collective of devices; `post`
    and `take`, a message of hosts, which waits only to arrive; `vote` and `count`, a collective
    of hosts, which waits only for its result.
    """

    kind: str
    peer: int = -1  # of a message of hosts
    parts: tuple[Part, ...] = ()


def stuck(programs: list[list[Step]]) -> dict[int, Step]:
    """Run a program on each rank; return where ranks wait for ever, {} if all end."""
    at = [0] * len(programs)
    numbers: list[Counter[Any]] = [Counter() for _ in programs]
    done: set[Any] = set()
    awaited: dict[int, set[Any]] = {}
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                if rank not in awaited:
                    marks = _marks(program[at[rank]], rank, len(programs), numbers[rank])
                    done |= marks[0]
                    awaited[rank] = marks[1]
                if not awaited[rank] <= done:
                    break
                del awaited[rank]
                at[rank] += 1
                moved = True
    return {rank: programs[rank][at[rank]] for rank in awaited}


def _marks(step: Step, rank: int, world: int, numbers: Counter[Any]) -> tuple[set, set]:
    """Return what a rank makes known when it begins a step, and what the step waits for."""

    def number(*key: Any) -> int:
        numbers[key] += 1
        return numbers[key]

    own, others, everyone = set(), set(), range(world)
    for way, peer, channel, size in step.parts:
        ends = (rank, peer) if way == "send" else (peer, rank)
        message = (*ends, channel, number(*ends, channel), size)
        own.add((way, *message))
        others.add(("receive" if way == "send" else "send", *message))
    match step.kind:
        case "post":
            own = {("post", rank, step.peer, number("post", step.peer))}
        case "take":
            others = {("post", step.peer, rank, number("take", step.peer))}
        case "vote":
            own = {("vote", rank, number("vote"))}
        case "count":
            count = number("count")
            others = {("vote", each, count) for each in everyone}
        case "meet":
            count = number("meet")
            own, others = {("meet", rank, count)}, {("meet", each, count) for each in everyone}
    return own, others
