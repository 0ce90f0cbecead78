"""tools/compare_estimators.py: bands of known numbers; interrupted, killed and failed runs."""

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.settings.estimators import ENTRIES
from tests.ranks import _fork_server

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
import compare_estimators  # noqa: E402
from compare_plan import plan, read_members  # noqa: E402
from compare_results import Estimate, Finished, at_edge, best_choice, difference  # noqa: E402

EXAMPLES = ROOT / "examples" / "compare"
MICRO = """
task: {name: TASK, train_problems: 32, eval_problems: 8}
model: {num_layers: 1, hidden_size: 16, ffn_hidden_size: 32, num_attention_heads: 2,
  max_sequence_length: 32, init_std: 0.25}
sampling: {completion_length: 6, block_length: 6, denoising_steps: 3}
sft: {iterations: 2, batch_size: 8}
algorithm: {prompts_per_iteration: 4, group_size: 4}
train: {flops: 6.0e+7, iterations: 50}
evaluation: {interval: 2}
checkpoint: {interval: 1, best: null}
""".replace("TASK", str(ROOT / "examples" / "my_task.py"))
MEMBERS = """
baseline: agrpo
seeds: [0, 1]
tuning_seeds: [7]
common: {optimizer.learning_rate: 1.0e-2}
members:
  agrpo: {algorithm.mc_samples: 2}
  broken: {algorithm.name: "BROKEN:raises"}
  merged:
    algorithm.name: step_merge
    algorithm.mc_samples: 2
    optimizer.learning_rate: [1.0e-3, 1.0e-2]
"""
BROKEN = """
def raises(rollout, context):
    raise ArithmeticError("no rows today")
"""


def _finished(seed, final):
    return Finished(seed, 0.25, final, 3, 1e9, 5e8, 1.0, 0.5, ((0, 0.25), (3, final)), (), ())


def test_a_band_is_students_interval_of_the_mean_over_seeds():
    found = Estimate.of([0.1, 0.2, 0.3, 0.4, 0.5])
    half = 2.776445 * math.sqrt(0.025) / math.sqrt(5)
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half))


def test_a_difference_is_paired_by_seed():
    """Seeds differ much and the pairs little: the band is that of the pairs."""
    ours = [_finished(1, 0.70), _finished(0, 0.20), _finished(3, 0.9)]
    theirs = [_finished(0, 0.15), _finished(1, 0.60), _finished(2, 0.1)]
    found = difference(ours, theirs)
    half = 12.706205 * 0.05 / 2  # the standard error of two values is half their distance
    expected = (0.075, 0.075 - half, 0.075 + half)
    assert (found.mean, found.low, found.high) == pytest.approx(expected)
    assert difference(ours, theirs[2:]) is None, "one pair has no band"


def test_the_best_choice_is_the_first_with_the_highest_mean():
    assert best_choice([[0.1, 0.3], [0.4, 0.1], [0.2, 0.3]]) == 1
    assert best_choice([[], [0.1], [0.1]]) == 1, "a choice without a finished run has no mean"
    assert best_choice([[], []]) is None


def test_a_chosen_value_at_the_edge_of_its_grid_is_named():
    grid = [{"optimizer.learning_rate": value, "algorithm.mc_samples": 4} for value in (1, 2, 3)]
    assert [at_edge(grid, choice) for choice in grid] == [
        ("optimizer.learning_rate",),
        (),
        ("optimizer.learning_rate",),
    ]


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_the_examples_compare_ten_estimators_over_five_seeds(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    members = read_members(EXAMPLES / "members.yaml")
    comparison = plan(EXAMPLES / f"{name}.yaml", members, [], None)
    assert len(members.seeds) >= 5 and not set(members.seeds) & set(members.tuning_seeds)
    budgets, estimators = set(), set()
    for member, choices in members.choices.items():
        settings = comparison.runs(member, choices[0])[0].settings
        budgets.add(settings.train.flops)
        estimators.add(settings.algorithm.name)
    assert len(budgets) == 1 and None not in budgets
    assert len(estimators & set(ENTRIES)) >= 10


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.flops=null", "train.flops=null gives members no equal budget"),
        ("sft.iterations=0", "sft.iterations=0 makes no start"),
        ("task.eval_problems=5000", "countdown.yaml: task.train_problems=1900 and task.eval_pro"),
        ("algorithm.proposal=uniform", "member full_trajectory of countdown: algorithm.proposal"),
    ],
)
def test_what_cannot_be_compared_is_refused(override, said):
    members = read_members(EXAMPLES / "members.yaml")
    with pytest.raises(ValueError, match=said):
        plan(EXAMPLES / "countdown.yaml", members, [override], None)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("baseline: agrpo", "baseline: other", "baseline=other is no member"),
        ("seeds: [0, 1]", "seeds: [0]", "must be at least two"),
        ("seeds: [0, 1]", "seeds: [0, 7]", "none of tuning_seeds"),
        ("tuning_seeds: [7]", "tuning_seeds: []", "tuning_seeds is empty"),
        ("common", "shared", "common is missing or unknown"),
    ],
)
def test_a_wrong_file_of_members_is_refused(tmp_path, old, new, said):
    path = tmp_path / "members.yaml"
    path.write_text(MEMBERS.replace(old, new))
    with pytest.raises(ValueError, match=said):
        read_members(path)


def test_other_seeds_keep_the_tuning_and_start_from_phases_of_their_own(tmp_path):
    given, other = (read_members(EXAMPLES / "members.yaml", seeds) for seeds in (None, [5, 6]))
    assert other.seeds == (5, 6) and other.tuning_seeds == given.tuning_seeds
    first, second = (plan(EXAMPLES / "countdown.yaml", m, [], tmp_path) for m in (given, other))
    assert first.tuning() == second.tuning()
    shared = {job.directory for job in first.starts()} & {job.directory for job in second.starts()}
    assert {path.name for path in shared} == {"seed-100"}
    with pytest.raises(ValueError, match=r"seeds=\[5, 100\] must be .* none of tuning_seeds"):
        read_members(EXAMPLES / "members.yaml", [5, 100])


def _when_begun(directory, act, phase="rl"):
    """Call a function, in a thread, once a run has logged a record of a phase."""

    def watch():
        path = directory / "metrics.jsonl"
        while not path.exists() or f'"phase": "{phase}"' not in path.read_text():
            time.sleep(0.002)
        act()

    threading.Thread(target=watch, daemon=True).start()


def _interrupt():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def _kill_the_child():
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)


def _rows(directory, phase="rl"):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["phase"] == phase]


def test_a_comparison_is_interrupted_killed_and_continued(tmp_path, capfd):
    # A shell starts its background jobs with interrupts ignored, and tests may be one of them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _fork_server()  # the tool's processes come from the server of the other tests
    (tmp_path / "task.yaml").write_text(MICRO)
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "members.yaml").write_text(MEMBERS.replace("BROKEN", str(tmp_path / "broken.py")))
    words = [str(tmp_path / "task.yaml"), "--output", str(tmp_path), "--workers", "1"]
    folder = tmp_path / "task"
    first, second = (folder / "runs" / "agrpo" / f"seed-{seed}" for seed in (0, 1))

    _when_begun(folder / "starts" / "seed-7", _kill_the_child, phase="sft")
    assert compare_estimators.main(words) == 1
    assert "seed-7: failed its process ended with signal 9" in capfd.readouterr().err
    assert not (folder / "tuning").exists(), "without all starts, no member begins"

    _when_begun(first, _interrupt)
    assert compare_estimators.main(words) == 130
    before = _rows(first)
    assert before and not second.exists()
    assert not multiprocessing.active_children()

    _when_begun(second, _kill_the_child, phase="eval")  # before the first iteration
    assert compare_estimators.main(words) == 1
    printed = capfd.readouterr()
    assert f"{second} failed: its process ended with signal 9" in printed.out
    assert "agrpo has fewer than two finished seeds" in printed.err
    assert _rows(first)[: len(before)] == before, "the interrupted run was continued"
    assert "| `merged` |" in (folder / "results.md").read_text(), "the others are not lost"
    kept = (folder / "runs" / "merged" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns

    assert compare_estimators.main(words) == 1
    printed = capfd.readouterr()
    assert "ArithmeticError: no rows today" in printed.err
    assert (folder / "runs" / "merged" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == kept
    _check_results(folder, printed.out)


def _check_results(folder, printed):
    found = json.loads((folder / "results.json").read_text())
    members = {member["name"]: member for member in found["members"]}
    assert set(members) == {"agrpo", "merged"}
    for name, member in members.items():
        for seed, run in zip((0, 1), member["runs"], strict=True):
            rows = _rows(folder / "runs" / name / f"seed-{seed}")
            assert [row["iteration"] for row in rows] == list(range(1, run["iterations"] + 1))
            spent = sum(row["flops"] for row in rows)
            assert run["flops"] == spent >= 6e7 > spent - rows[-1]["flops"]
            assert 0 < run["update_flops"] == sum(row["update_flops"] for row in rows) < spent
            last = _rows(folder / "runs" / name / f"seed-{seed}", "eval")[-1]
            assert (last["stage"], last["accuracy"]) == ("after", run["final"])
    starts = {name: [run["start"] for run in member["runs"]] for name, member in members.items()}
    assert starts["agrpo"] == starts["merged"], "members of a seed start from the same weights"
    tuned = [choice["accuracies"] for choice in found["tuning"]["merged"]]
    chosen = members["merged"]["settings"]["optimizer.learning_rate"]
    assert chosen == (1e-3, 1e-2)[best_choice(tuned)]
    assert members["agrpo"]["difference"] is None and members["merged"]["difference"]["low"] <= 0.5
    variance = json.loads((folder / "variance" / "variance.json").read_text())
    assert {row["estimator"] for row in variance["rows"]} >= {"agrpo", "merged"}
    for name in ("finals", "accuracy_flops", "accuracy_cpu", "entropy", "variance"):
        assert (folder / f"{name}.png").stat().st_size > 5000, name
    assert "| `agrpo` | learning_rate 0.01, mc_samples 2 |" in printed
    assert load(Settings, folder / "runs" / "agrpo" / "seed-1" / "config.yaml").run.seed == 1
