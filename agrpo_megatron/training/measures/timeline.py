"""When each part of an iteration began and ended, on each rank: a line of the run's timeline."""

from collections.abc import Iterable

from agrpo_megatron.megatron.parallel import gather_objects
from agrpo_megatron.rollout.session import Session

RANKS = 16  # that are recorded, evenly spread
SHORTEST = 1e-3  # seconds; shorter parts are left out
APART = 1e-2  # seconds; parts of a kind that are closer are one
GRADING = "grading"  # by workers, while this rank does other work

type Span = tuple[str, float, float]  # part, begin and end in seconds since 1970


def record_timeline(session: Session) -> None:
    """Write the parts of the current iteration so far; called by every rank."""
    sections, ranks = session.safety.sections, session.run.ranks
    grader, every = session.run.grader, -(-ranks.world_size // RANKS)
    mine = None
    if ranks.rank % every == 0:
        graded = [(GRADING, *grader.spans.popleft()) for _ in range(len(grader.spans))]
        mine = ranks.rank, merged([*sections.spans, *graded])
    found = dict(part for part in gather_objects(mine) if part is not None)
    session.output.log.timeline(
        {"phase": sections.phase, "iteration": sections.iteration, "ranks": found}
    )


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return spans by their beginning, to the millisecond; close ones of a kind are joined."""
    found: list[Span] = []
    last: dict[str, int] = {}  # the place of each part's latest span
    for part, begin, end in sorted(spans, key=lambda span: span[1]):
        place = last.get(part)
        if place is not None and begin - found[place][2] < APART:
            found[place] = part, found[place][1], max(end, found[place][2])
        else:
            last[part] = len(found)
            found.append((part, begin, end))
    return [(p, round(b, 3), round(e, 3)) for p, b, e in found if e - b >= SHORTEST]
