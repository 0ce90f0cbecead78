"""A replay of rollouts that do not fit the run is refused before anything starts."""

import shutil
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.runs.stored_rollouts import check_replay
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.tiny import resolved_run, silent_view

RUN = ["train.iterations=2", "checkpoint.keep_rollouts=true", "evaluation.interval=0"]
AGAIN = "train it again (--restart) with checkpoint.keep_rollouts=true"


def _train(run_dir):
    train(resolved_run(run_dir, *RUN), silent_view())


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return the directory of a run that kept the rollouts of its two iterations."""
    source = tmp_path_factory.mktemp("runs") / "source"
    run_ranks(1, _train, source)
    return source


@pytest.fixture
def copy(stored, tmp_path):
    """Return a copy of that run, for changes."""
    return shutil.copytree(stored, tmp_path / "source")


def _resolved(source, *overrides, iterations=2):
    given = [f"train.from_rollouts={source}", f"train.iterations={iterations}", *overrides]
    return resolved_run(source.parent / "replay", *given)


def _refusal(*args, **options):
    with pytest.raises(ValueError, match="; ") as error:
        check_replay(_resolved(*args, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def _edit(source, old, new):
    path = source / "config.yaml"
    content = path.read_text()
    assert content.count(old) == 1
    path.write_text(content.replace(old, new))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm.mc_samples=1", "algorithm.proposal=entropy"],
        ["algorithm.name=diffu_grpo", "algorithm.mc_samples=null", "train.token_budget=64"],
        ["checkpoint.rollouts=false", "evaluation.interval=1"],
        ["sft.iterations=3", "model.init_std=0.1", "evaluation.temperature=0.5"],
    ],
)
def test_what_does_not_determine_the_rollouts_may_differ(stored, overrides):
    check_replay(_resolved(stored, *overrides))


def test_fewer_iterations_and_an_unfinished_run_will_do(copy):
    (copy / "rollouts" / "000001.safetensors").unlink()
    check_replay(_resolved(copy, iterations=1))


def test_the_check_needs_no_ranks(stored):
    check_replay(_resolved(stored))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("override", "old"),
    [
        ("run.seed=1", "run.seed=0"),
        ("model.vocab_size=84", "model.vocab_size=83"),
        ("model.mask_token_id=80", None),
        ("model.eos_token_id=80", None),
        ("sampling.temperature=0.5", "sampling.temperature=1"),
        ("sampling.completion_length=16", "sampling.completion_length=8"),
        ("sampling.top_k=9", "sampling.top_k=null"),
        ("sampling.unmasking=low_confidence", "sampling.unmasking=random"),
        ("algorithm.group_size=3", "algorithm.group_size=4"),
        ("algorithm.prompts_per_iteration=4", "algorithm.prompts_per_iteration=3"),
        ("algorithm.resample_rounds=1", "algorithm.resample_rounds=0"),
    ],
)
def test_a_setting_of_the_sampling_that_differs_is_named_with_its_value(stored, override, old):
    said = _refusal(stored, override)
    assert said.startswith(f"{override} differs from train.from_rollouts={stored}, whose rollouts ")
    assert old is None or said.endswith(f"were sampled with {old}; use {old}")


def test_other_problems_are_refused(stored):
    said = _refusal(stored, "task.train_problems=23")
    assert "its rollouts are of other training problems than this run's" in said


def test_other_prompts_of_the_same_problems_are_refused(stored, monkeypatch):
    resolved = _resolved(stored)
    monkeypatch.setattr(resolved.task, "prompt", lambda problem: f"{problem.key}?")
    with pytest.raises(ValueError, match="its prompts are not this run's token by token; use tok"):
        check_replay(resolved)


def test_a_directory_without_a_run_is_refused(tmp_path):
    said = _refusal(tmp_path / "nowhere")
    assert said.startswith(f"train.from_rollouts={tmp_path / 'nowhere'} is not a run directory (")
    assert "data.json: No such file" in said


def test_a_run_that_kept_nothing_is_refused(copy):
    shutil.rmtree(copy / "rollouts")
    said = _refusal(copy)
    assert said.endswith(f"{copy} stores no rollouts of its first iteration; {AGAIN}")


def test_a_run_that_replays_itself_names_the_run_that_sampled(copy, stored):
    shutil.rmtree(copy / "rollouts")
    _edit(copy, "from_rollouts: null", f"from_rollouts: {stored}")
    assert _refusal(copy).endswith(f"use train.from_rollouts={stored}")


def test_more_iterations_than_are_stored_are_refused(stored):
    said = _refusal(stored, iterations=3)
    assert said.endswith(
        "stores the rollouts of 2 iterations, and train.iterations=3 is more; use at most 2"
    )


def test_a_damaged_round_and_a_round_of_other_settings_are_refused(copy):
    """The learning rate determines the weights that sampled, so the digest has it."""
    last = copy / "rollouts" / "000001.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:40])
    assert f"{last} is damaged" in _refusal(copy)
    last.write_bytes(whole)
    check_replay(_resolved(copy))
    _edit(copy, "  learning_rate: 0.01\n", "  learning_rate: 0.02\n")
    assert "000000.safetensors is damaged, of another version" in _refusal(copy)


def test_a_run_that_samples_is_not_checked(tmp_path):
    resolved = resolved_run(tmp_path / "run")
    assert resolved.settings.train.from_rollouts is None
    check_replay(replace(resolved, task=None))
