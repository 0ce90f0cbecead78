"""A run directory is continued by its own settings only, and never overwritten."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from agrpo_megatron.config.schema import build, to_yaml
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.directory import (
    changed_settings,
    check_data,
    data_digests,
    digests_so_far,
    is_finished,
    move_away,
    progress,
    run_digest,
)
from agrpo_megatron.runs.history.changes import write_changes
from agrpo_megatron.runs.progress import Progress
from agrpo_megatron.tasks import build_task

HALF = Progress("rl", 50, {"metrics.jsonl": 7})


@pytest.fixture
def settings(tmp_path):
    """Return the settings of a run that was cut off half-way."""
    settings = build(Settings, {"run": {"dir": str(tmp_path / "run")}})
    checkpoint = tmp_path / "run" / "checkpoints" / HALF.name
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text(json.dumps(asdict(HALF)))
    (checkpoint.parent / "latest").write_text(HALF.name)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(settings))
    return settings


def _changed(settings, key, value):
    tree = asdict(settings)
    *sections, name = key.split(".")
    node = tree
    for part in sections:
        node = node[part]
    node[name] = value
    return build(Settings, tree)


def test_the_same_settings_continue_where_the_run_was(settings):
    assert progress(settings) == HALF
    assert not is_finished(settings, HALF)
    assert is_finished(settings, Progress("rl", settings.train.iterations, {}))
    assert not is_finished(settings, Progress("sft", settings.train.iterations, {}))


def test_a_run_that_ended_early_is_finished(settings):
    train = replace(settings.train, flops=1e9)
    ended = replace(HALF, stopped="1e+09 FLOPs: train.flops=1e+09", flops=10**9)
    assert is_finished(replace(settings, train=train), ended)
    assert not is_finished(settings, replace(HALF, phase="sft", stopped="never"))


def test_a_new_directory_has_no_progress(tmp_path):
    settings = build(Settings, {"run": {"dir": str(tmp_path / "new")}})
    assert progress(settings) is None
    assert not is_finished(settings, None)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("run.seed", 1, "run.seed=0, not 1"),
        ("optimizer.adam_beta2", 0.9, "optimizer.adam_beta2=0.99, not 0.9, which may not change"),
        ("sft.iterations", 9, "sft.iterations=0, not 9, which may not change: reinforcement"),
        ("sft.epochs", 3.0, "sft.epochs=None, not 3.0, which may not change: reinforcement"),
        ("sft.optimizer.learning_rate", 1e-3, "the supervised phase is over"),
        ("evaluation.temperature", 0.5, "accuracies before and after would not compare"),
        ("sampling.top_k", 5, "sampling.top_k=None, not 5"),
        ("model.megatron", {"attention_dropout": 0.1}, "model.megatron.attention_dropout=None"),
        ("task.options", {"numbers": 4}, "task.options.numbers=None, not 4"),
        ("task.grader.seconds", 3.0, "task.grader.seconds=10.0, not 3.0"),
        ("train.from_rollouts", "runs/a", "train.from_rollouts=None, not runs/a"),
    ],
)
def test_a_changed_setting_is_refused_by_its_key(settings, key, value, said):
    with pytest.raises(ValueError, match="--restart") as error:
        progress(_changed(settings, key, value))
    assert said in str(error.value)
    assert str(settings.run.dir) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.learning_rate", 1e-3),
        ("optimizer.decay", "cosine"),
        ("train.iterations", 200),
        ("train.token_budget", 100),
        ("algorithm.mc_samples", "auto"),
        ("evaluation.interval", 0),
        ("train.stop_metric", "accuracy"),
    ],
)
def test_what_alters_only_what_follows_may_change_and_is_named(settings, key, value):
    changed = _changed(settings, key, value)
    assert progress(changed) == HALF
    (change,) = changed_settings(changed, HALF)
    assert (change.key, change.new) == (key, value)
    assert changed_settings(settings, HALF) == []


def test_a_run_has_at_least_the_iterations_that_are_finished(settings):
    for planned in (50, 100):
        progress(_changed(settings, "train.iterations", planned))
    with pytest.raises(ValueError, match="train.iterations=49: .* finished 50 .* use at least 50"):
        progress(_changed(settings, "train.iterations", 49))


def test_a_run_whose_limit_is_raised_is_not_finished(settings):
    """It is judged again, by the limit of now and the evaluation of then."""
    ended = replace(
        HALF, stopped="...", scores={"accuracy": 0.8}, flops=10**12, stop_best=0.9, stop_waited=3
    )

    def ended_by(**limits):
        changed = replace(settings, train=replace(settings.train, **limits))
        return is_finished(changed, ended)

    assert ended_by(flops=1e12) and not ended_by(flops=2e12) and not ended_by()
    by = {"stop_metric": "accuracy"}
    assert ended_by(**by, stop_target=0.8) and not ended_by(**by, stop_target=0.81)
    assert ended_by(**by, stop_patience=3) and not ended_by(**by, stop_patience=4)
    ended = replace(ended, stop_metric="reward/mean", stop_best=0.5)
    assert not ended_by(**by, stop_patience=3)  # the evaluations in vain were of another metric


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.threads", 1),
        ("run.timeout", 30.0),
        ("checkpoint.interval", 5),
        ("logging.samples", 1),
        ("parallel.tensor", 2),
        ("rollout.rows", 4),
        ("task.grader.workers", 7),
    ],
)
def test_what_changes_no_number_may_change(settings, key, value):
    assert progress(_changed(settings, key, value)) == HALF


def test_what_the_supervised_phase_does_not_use_may_change_until_it_is_over(settings):
    changed = _changed(settings, "algorithm.group_size", 4)
    sft = replace(HALF, phase="sft", iteration=0)
    root = Path(settings.run.dir, "checkpoints")
    (root / sft.name).mkdir()
    (root / sft.name / "progress.json").write_text(json.dumps(asdict(sft)))
    (root / "latest").write_text(sft.name)
    assert progress(changed) == sft
    longer = _changed(_changed(settings, "sft.epochs", 3.0), "sft.iterations", 9)
    assert [change.key for change in changed_settings(longer, sft)] == [
        "sft.iterations",
        "sft.epochs",
    ]


OWN = """
from agrpo_megatron.tasks.base import Task
from agrpo_megatron.types import Problem


class Own(Task):
    name = "own"

    def load(self):
        train = [Problem(str(i), {}, "1") for i in range(3)]
        return {"train": train, "eval": [Problem("e", {}, "")]}
"""


def _own(file, text):
    file.write_text(text)
    return build_task(build(Settings, {"task": {"name": str(file)}}).task)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("range(3)", "range(4)", "whose training problems changed; restore them, choose"),
        ('"1")', '"2")', "whose training problems changed"),
        ('"e"', '"f"', "whose held-out problems changed"),
        ('"own"', '"own"  # reworded', "own.py changed"),
    ],
)
def test_other_problems_or_another_task_file_are_refused(tmp_path, old, new, said):
    file, run = tmp_path / "own.py", tmp_path / "run"
    task = _own(file, OWN)
    check_data(run, task, is_new=True, is_main=True)
    for is_main in (True, False):
        check_data(run, task, is_new=False, is_main=is_main)
    changed = _own(file, OWN.replace(old, new))
    with pytest.raises(ValueError, match=said):
        check_data(run, changed, is_new=False, is_main=False)
    check_data(run, changed, is_new=True, is_main=True)
    check_data(run, changed, is_new=False, is_main=False)


def test_what_is_sampled_depends_on_settings_and_problems_alone(settings, tmp_path):
    task = _own(tmp_path / "own.py", OWN)
    data = data_digests(task)
    mine = run_digest(settings, data)
    assert mine == run_digest(_changed(settings, "parallel.tensor", 2), data)
    assert mine != run_digest(_changed(settings, "sampling.temperature", 0.5), data)
    other = _own(tmp_path / "own.py", OWN.replace("(3)", "(4)"))
    assert mine != run_digest(settings, data_digests(other))


def test_rollouts_of_before_a_change_are_still_the_run_s(settings):
    folder = Path(settings.run.dir)
    digests = [run_digest(settings, {})]
    for rate in (1e-3, 0.1):
        changed = _changed(settings, "optimizer.learning_rate", rate)
        changed = _changed(changed, "algorithm.mc_samples", 3)
        write_changes(folder, changed_settings(changed, HALF), HALF)
        (folder / "config.yaml").write_text(to_yaml(changed))
        digests.append(run_digest(changed, {}))
    assert len(set(digests)) == 3
    tasks = replace(changed.evaluation, tasks={"a": {"name": "sudoku"}})
    for evaluation in (tasks, replace(tasks, tasks={}), replace(tasks, tasks={"b": {}})):
        changed = replace(changed, evaluation=evaluation)
        write_changes(folder, changed_settings(changed, HALF), HALF)
        (folder / "config.yaml").write_text(to_yaml(changed))
        digests.append(run_digest(changed, {}))
    assert set(digests) <= digests_so_far(folder, changed, {})
    assert run_digest(_changed(settings, "run.seed", 1), {}) not in digests_so_far(
        folder, changed, {}
    )


def test_an_option_that_was_taken_away_is_refused_too(settings):
    """The directory's run had it: going on without it would be another run."""
    with_option = _changed(settings, "task.options", {"numbers": 4})
    Path(settings.run.dir, "config.yaml").write_text(to_yaml(with_option))
    with pytest.raises(ValueError, match=r"task\.options\.numbers=4, not None"):
        progress(settings)


def test_an_earlier_run_is_renamed_never_deleted(tmp_path):
    run = tmp_path / "run"
    assert move_away(run) is None
    for number in (1, 2):
        run.mkdir()
        (run / "note").write_text(str(number))
        assert move_away(run) == tmp_path / f"run.{number}"
    assert [(tmp_path / f"run.{n}" / "note").read_text() for n in (1, 2)] == ["1", "2"]
    assert not run.exists()
