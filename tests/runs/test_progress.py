"""What a run's directory says about its checkpoints."""

import json
from dataclasses import asdict

import pytest

from agrpo_megatron.runs.progress import (
    Progress,
    checkpoint_path,
    latest_checkpoint,
    read_progress,
)


def _write(run, progress, *, is_latest):
    path = run / "checkpoints" / progress.name
    path.mkdir(parents=True)
    (path / "progress.json").write_text(json.dumps(asdict(progress)))
    if is_latest:
        (run / "checkpoints" / "latest").write_text(progress.name)
    return path


def test_the_latest_checkpoint_is_the_one_pointed_at(tmp_path):
    progress = Progress("rl", 9, {"metrics.jsonl": 12})
    path = _write(tmp_path, progress, is_latest=True)
    _write(tmp_path, Progress("rl", 10, {}), is_latest=False)
    assert latest_checkpoint(tmp_path / "checkpoints") == (path, progress)
    assert checkpoint_path(tmp_path) == path
    assert checkpoint_path(tmp_path, "rl-000010").name == "rl-000010"


def test_a_new_run_has_none_and_says_so(tmp_path):
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    with pytest.raises(ValueError, match="holds no checkpoint; train it first"):
        checkpoint_path(tmp_path)


def test_an_unknown_name_is_answered_with_those_there_are(tmp_path):
    _write(tmp_path, Progress("sft", 5, {}), is_latest=True)
    (tmp_path / "checkpoints" / ".partial-rl-000001").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint rl-000001; it has sft-000005$"):
        checkpoint_path(tmp_path, "rl-000001")


@pytest.mark.parametrize("content", [None, "{", "{}", "[1]"])
def test_a_directory_without_a_whole_record_is_not_a_checkpoint(tmp_path, content):
    if content is not None:
        (tmp_path / "progress.json").write_text(content)
    with pytest.raises(RuntimeError, match="does not hold a whole checkpoint"):
        read_progress(tmp_path)


def test_names_sort_in_order_of_time():
    names = [Progress("rl", i, {}).name for i in (2, 10, 999, 1000)]
    assert names == sorted(names)
