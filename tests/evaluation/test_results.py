"""An evaluation's directory: what may stand there before."""

import pytest

from agrpo_megatron.evaluation.grid import EVALUATION
from agrpo_megatron.evaluation.results import ResultStore


def test_an_attempt_that_was_killed_as_it_began_is_a_new_one(tmp_path):
    (tmp_path / f".{EVALUATION}").write_text("{")
    store = ResultStore(tmp_path)
    assert not store.is_begun() and store.stored() is None
    store.begin({"evaluates": {}})
    assert store.is_begun() and store.stored() == {"evaluates": {}}


@pytest.mark.parametrize("place", ["notes.txt", ""])
def test_a_file_or_a_folder_of_files_is_not_an_evaluation(tmp_path, place):
    (tmp_path / "notes.txt").write_text("mine")
    folder = tmp_path / place
    with pytest.raises(ValueError, match="holds no evaluation; use another --output"):
        ResultStore(folder).is_begun()
