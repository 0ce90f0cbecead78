"""What the start of an attempt refuses, and what it only warns of."""

from types import SimpleNamespace

import pytest

from agrpo_megatron.runs.progress import Progress
from agrpo_megatron.training import opening


def test_rewards_that_fail_end_a_run_that_starts_and_not_one_that_resumes(monkeypatch, tmp_path):
    def refuse(run, splits):
        raise ValueError("http://rewards does not answer; start it")

    monkeypatch.setattr(opening, "check_solutions", refuse)
    warned = []
    view = SimpleNamespace(warn=warned.append)
    session = SimpleNamespace(run=None, output=SimpleNamespace(view=view))
    with pytest.raises(ValueError, match="http://rewards does not answer"):
        opening._graded_solutions(session, None)
    assert not warned
    assert opening._graded_solutions(session, (tmp_path, Progress("rl", 3, {}))) == []
    (line,) = warned
    assert "http://rewards does not answer" in line and "the run resumes" in line
