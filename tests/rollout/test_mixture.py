"""A mixture through a whole run: shares, metrics of each task, the best of one, notes that stay."""

import pytest

from agrpo_megatron.runs.progress import read_progress
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.kills import kill_after_line
from tests.training.test_run import read
from tests.training.tiny import same_metrics, silent_view, tiny

MIXTURE = "{few: {name: countdown, weight: 2, options: {numbers: 2}}, sudoku: {}}"
RUN = [
    "task.name=mixture",
    "task.options={}",
    f"task.mixture={MIXTURE}",
    "sampling.completion_length=16",
    "sft.iterations=2",
    "train.iterations=3",
    "evaluation.interval=1",
    "checkpoint.interval=1",
    "checkpoint.best=accuracy/sudoku",
    "algorithm.prompts_per_iteration=6",
]


def _train(run_dir, line=None):
    """Return what was said, and the labels of the problems of both splits."""
    if line is not None:
        kill_after_line(line)
    view, said = silent_view(), []
    view.note = said.append
    resolved = resolve(tiny(*RUN, f"run.dir={run_dir}"), world_size=1)
    resolved.task.notes.append("few: something to know")
    train(resolved, view)
    return said


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "mixed"
    return directory, run_ranks(1, _train, directory)[0]


def test_metrics_tell_the_tasks_apart(run):
    records = [r for r in read(run[0] / "metrics.jsonl") if r["phase"] != "sft"]
    assert len(records) == 7
    for record in records:
        share = 2 / 3 if record["phase"] == "rl" else 1 / 2
        for whole, of_task in (("accuracy", "accuracy/{}"), ("reward/mean", "reward/{}/mean")):
            few, sudoku = (record[of_task.format(label)] for label in ("few", "sudoku"))
            assert record[whole] == pytest.approx(share * few + (1 - share) * sudoku)


def test_the_best_of_one_task_is_kept(run):
    root = run[0] / "checkpoints"
    done = read_progress(root / (root / "best").read_text())
    scores = [
        r["accuracy/sudoku"]
        for r in read(run[0] / "metrics.jsonl")
        if r["phase"] == "eval" and r["stage"] != "before"
    ]
    assert done.best == max(scores)


def test_notes_are_said_and_kept_again_at_a_resume(run, tmp_path):
    directory, said = run
    assert said.count("few: something to know") == 1
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _train, tmp_path / "run", 6)
    (again,) = run_ranks(1, _train, tmp_path / "run")
    assert again.count("few: something to know") == 1
    assert any(text.startswith("resuming after rl iteration") for text in again)
    for folder in (directory, tmp_path / "run"):
        assert (folder / "notes.txt").read_text().splitlines().count("few: something to know") == 1
    ours, theirs = (read(folder / "metrics.jsonl") for folder in (tmp_path / "run", directory))
    assert same_metrics(ours, theirs)
