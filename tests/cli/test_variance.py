"""`agrpo variance`: its table, its files, and what it refuses."""

import json

import pytest

from tests.cli.test_evaluate import HF, ON_HF
from tests.cli.test_main import ROOT, agrpo, write_settings

SMALL = [*ON_HF, "algorithm.prompts_per_iteration=2", "algorithm.group_size=2"]
ANY_REWARD = [f"task.name={ROOT / 'examples' / 'llada_8b' / 'one_gpu.py'}"]
ANY_REWARD += ["algorithm.baseline=none"]


def test_a_table_a_figure_and_the_best_number_of_draws(tmp_path):
    output = tmp_path / "found"
    words = ["--draws=1,2", "--estimators=espo,diffu_grpo", "--output", output]
    words += ["--batches=1", "--repeats=2"]
    status, printed = agrpo(tmp_path, "variance", HF, *words, *SMALL, *ANY_REWARD)
    assert status == 0, printed
    assert "most signal for the work" in printed
    found = json.loads((output / "variance.json").read_text())
    labels = [row["estimator"] for row in found["rows"]]
    assert labels == ["agrpo, k 1", "agrpo, k 2", "full_trajectory", "espo", "diffu_grpo"]
    assert found["recommended"] in labels[:3]
    assert (output / "variance.png").stat().st_size > 10_000


def test_rewards_that_are_all_equal_leave_nothing_to_measure(tmp_path):
    status, printed = agrpo(tmp_path, "variance", HF, "--batches=1", *SMALL)
    assert status == 2 and "no completion of these batches has an advantage" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--draws=0"], "--draws=0 must be numbers from 1"),
        (["algorithm.prompts_per_iteration=3"], "prompts_per_iteration=3 cannot be halved"),
        (["--repeats=1"], "--repeats=1 must be at least 2"),
        (["--estimators=grpo"], "--estimators=grpo: use any of agrpo, full_trajectory"),
        (["--estimators=just_grpo"], "use sampling.unmasking=leftmost"),
    ],
)
def test_wrong_words_are_refused(tmp_path, words, said):
    status, printed = agrpo(tmp_path, "variance", HF, *SMALL, *words)
    assert status == 2 and said in printed


def test_stored_rollouts_are_measured_in_place_of_sampled_ones(tmp_path):
    """A step is a quarter of the work, as nothing is sampled; a batch too many is refused."""
    source, output = tmp_path / "source", tmp_path / "found"
    file = write_settings(tmp_path / "settings.yaml", checkpoint={"keep_rollouts": True})
    assert agrpo(tmp_path, "train", file, f"run.dir={source}")[0] == 0
    kept = {path.name: path.stat().st_mtime_ns for path in (source / "rollouts").iterdir()}
    words = ["variance", source, "--draws=1,2", "--repeats=2", "--output", output]
    words += [f"train.from_rollouts={source}", f"run.dir={tmp_path / 'other'}"]
    words += ["checkpoint.keep_rollouts=false"]
    status, printed = agrpo(tmp_path, *words, "--batches=3")
    assert status == 0, printed
    rows = json.loads((output / "variance.json").read_text())["rows"]
    assert [row["work"] for row in rows] == [0.25, 0.5, 1.0]
    assert rows[1]["draw_noise"] > 0
    assert kept == {path.name: path.stat().st_mtime_ns for path in (source / "rollouts").iterdir()}
    status, printed = agrpo(tmp_path, *words, "--batches=4")
    assert status == 2 and "--batches=4 is more than the 3 iterations" in printed
