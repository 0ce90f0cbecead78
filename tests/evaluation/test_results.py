"""An evaluation's directory: what may stand there before, and what identifies it."""

import pytest

from agrpo_megatron.evaluation.grid import EVALUATION
from agrpo_megatron.evaluation.plan import _task_identity
from agrpo_megatron.evaluation.results import ResultStore
from agrpo_megatron.runs.resolve import resolve
from tests.training.tiny import tiny


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


def test_each_file_of_rewards_identifies_an_evaluation(tmp_path):
    """Also one of two with the same name in two folders."""
    words, rows = [], tmp_path / "rows.jsonl"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "mine.py"
        file.write_text(f"def {name}(completion):\n    return 1.0\n")
        words.append(f"{file}:{name}")
    rows.write_text('{"prompt": "1"}\n{"prompt": "2"}\n')
    options = f"{{train: {rows}, reward: [{', '.join(words)}]}}"
    settings = tiny("task=null", f"task={{name: jsonl, options: {options}}}")
    resolved = resolve(settings, world_size=1)

    def identity():
        return _task_identity(resolved, resolved.task, resolved.task.problems("eval"))

    before = identity()
    for name in ("a", "b"):
        assert identity() == before
        file = tmp_path / name / "mine.py"
        file.write_text(file.read_text() + "# other\n")
        assert identity() != before
        before = identity()
