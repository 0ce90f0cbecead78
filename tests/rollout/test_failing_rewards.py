"""Training on a task file whose rewards hang, raise, allocate and die: it continues."""

import pytest

from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.tasks import hostile
from tests.tasks.hostile import FAILING
from tests.training.test_run import read
from tests.training.tiny import silent_view, tiny

COUNT, GROUP = 1 + len(FAILING), 2
RUN = [
    f"task.name={hostile.__file__}",
    "task.grader.seconds=2",
    "task.grader.memory=256",
    "task.grader.failed_score=-1",
    "task.grader.most_failed=1",  # 7 of 8 fail
    "task.train_problems=null",
    "task.eval_problems=null",
    "train.iterations=2",
    "evaluation.interval=0",
    f"algorithm.prompts_per_iteration={COUNT}",
    f"algorithm.group_size={GROUP}",
]


def _train(run_dir, size):
    """Return what the run warned of."""
    options = f"task.options={{folder: {run_dir.parent}}}"
    settings = tiny(*RUN, options, f"run.dir={run_dir}")
    view, warned = silent_view(), []
    view.warn = warned.append
    train(resolve(settings, world_size=size), view)
    return warned


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_goes_on_whatever_its_rewards_do(tmp_path, size):
    results = run_ranks(size, _train, tmp_path / "run", size)
    records = read(tmp_path / "run" / "metrics.jsonl")
    assert [r["phase"] for r in records] == ["eval", "rl", "rl", "eval"]
    failing, whole = len(FAILING) * GROUP, COUNT * GROUP
    for record in (r for r in records if r["phase"] == "rl"):
        assert record["failed_rewards"] == failing
        good = record["reward/mean"] * whole + failing
        assert 0 <= good <= 0.8 * GROUP, "only the others have a score above -1"
        assert record["timing/reward"] > 0 and record["timing/reward_hidden"] >= 0
    for record in (r for r in records if r["phase"] == "eval"):
        assert record["failed_rewards"] == len(FAILING)
    warned = [text for text in results[0] if text.startswith("iteration ")]
    alarms = [text for text in warned if "resilience.failed_rewards_alarm" in text]
    assert len(alarms) == 1, "at the first iteration over the limit"
    warned = [text for text in warned if text not in alarms]
    assert len(warned) == 2
    for number, text in enumerate(warned, start=1):
        head = f"iteration {number}: {failing} of {whole} rewards failed ({GROUP} "
        assert text.startswith(head) and text.endswith("); scored -1")
    evaluations = [text for text in results[0] if text.startswith("evaluation after iteration ")]
    assert len(evaluations) == 2
    assert all(f"{len(FAILING)} of {COUNT} rewards failed (" in text for text in evaluations)
    samples = (tmp_path / "run" / "samples.jsonl").read_text()
    assert len(samples.splitlines()) == 4 * 4
