"""What a run keeps of its rollouts and what it replays exclude each other."""

import pytest

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings

KEEP = "checkpoint.keep_rollouts=true"


def _refusal(*overrides):
    with pytest.raises(ValueError, match="; ") as error:
        validate(load(Settings, None, list(overrides)))
    return str(error.value)


def test_rollouts_that_are_not_stored_cannot_be_kept():
    said = _refusal(KEEP, "checkpoint.rollouts=false")
    assert said.startswith(f"{KEEP} needs checkpoint.rollouts=true")


def test_a_replay_has_no_rollouts_to_keep():
    said = _refusal(KEEP, "train.from_rollouts=runs/other")
    assert said.startswith(f"{KEEP} keeps nothing, as train.from_rollouts=runs/other samples")


@pytest.mark.parametrize("same", ["runs/one", "runs/../runs/one/", "runs/link"])
def test_a_run_does_not_replay_itself_under_any_name(tmp_path, monkeypatch, same):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "link").symlink_to("one")
    said = _refusal("run.dir=runs/one", f"train.from_rollouts={same}")
    assert said.startswith(f"train.from_rollouts={same} is the run's own run.dir=runs/one")
    assert said.endswith("choose another run.dir")


def test_another_run_is_accepted():
    validate(load(Settings, None, ["train.from_rollouts=runs/other"]))
    validate(load(Settings, None, [KEEP]))
