"""The timeline of an iteration: parts of sections, close ones joined, of all ranks."""

import json

import torch.distributed as dist

from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.training.measures.timeline import merged, record_timeline
from tests.ranks import run_ranks
from tests.training.tiny import open_session


def test_close_spans_of_a_part_are_one_and_short_ones_are_left_out():
    spans = [("grading", 1.0, 1.5), ("rollout", 0.5, 2.0), ("grading", 1.505, 1.6)]
    spans += [("grading", 1.7, 1.8), ("scoring", 2.0, 2.0005)]
    expected = [("rollout", 0.5, 2.0), ("grading", 1.0, 1.6), ("grading", 1.7, 1.8)]
    assert merged(spans) == expected


def test_a_part_lies_within_its_section_and_an_iteration_begins_empty():
    sections = Sections()
    sections.at("rl", 1)
    with sections("update"), sections.timed("scoring"):
        pass
    (inner, *within), (outer, *whole) = sections.spans
    assert (inner, outer) == ("scoring", "update")
    assert whole[0] <= within[0] <= within[1] <= whole[1]
    sections.at("rl", 2)
    assert sections.spans == []


def _recorded():
    session, _ = open_session(world_size=2)
    rank, lines = dist.get_rank(), []
    session.output.log.timeline = lines.append
    session.safety.sections.at("rl", 7)
    session.safety.sections.spans += [("rollout", rank + 1.0, rank + 2.0)]
    session.run.grader.spans.append((rank + 1.5, rank + 3.0))
    record_timeline(session)
    return json.loads(json.dumps(lines[0])), len(session.run.grader.spans)


def test_a_line_has_all_ranks_and_the_work_in_the_background():
    (line, left), _ = run_ranks(2, _recorded)
    assert (line["phase"], line["iteration"], left) == ("rl", 7, 0)
    assert line["ranks"] == {
        "0": [["rollout", 1.0, 2.0], ["grading", 1.5, 3.0]],
        "1": [["rollout", 2.0, 3.0], ["grading", 2.5, 4.0]],
    }
