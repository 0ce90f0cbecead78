"""Alarms begin, speak once, end; and runs that are driven into each of their states."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.training import rl
from agrpo_megatron.training.alarms import ALARMS, FIRST, Alarms
from agrpo_megatron.training.run import train
from agrpo_megatron.training.supervised import drawn
from tests.ranks import run_ranks
from tests.runs.test_log import wandb_records
from tests.training.test_run import read
from tests.training.tiny import open_session, resolved_run, silent_view

NAMES = ["ratio", "mismatch", "mismatch_tail", "empty", "entropy", "entropy_rise"]
NAMES += ["failed_rewards", "zero_variance"]
# alarm: metric, setting, a value that is past it, one that is not
STATES = {
    "ratio": ("ratio/max_error", "train.ratio_alarm", 0.02, 0.01),
    "mismatch": ("mismatch/mean", "train.mismatch_alarm", 1.5, 1.25),
    "mismatch_tail": ("mismatch/p99", "train.mismatch_tail_alarm", 2.5, 2.0),
    "empty": ("completions/empty_fraction", "resilience.empty_alarm", 0.75, 0.5),
    "entropy": ("entropy", "resilience.entropy_alarm", 0.01, 0.25),
    "failed_rewards": ("failed_rewards_fraction", "resilience.failed_rewards_alarm", 0.5, 0.25),
    "zero_variance": ("zero_advantage_fraction", "resilience.zero_variance_alarm", 1.0, 0.75),
}
LEVELS = {
    "ratio": 0.01,
    "mismatch": 1.25,
    "mismatch_tail": 2.0,
    "empty": 0.75,
    "entropy": 0.25,
    "failed_rewards": 0.5,
    "zero_variance": 1.0,
}


class _Alerts:
    """Stand in for the run's log: keep the alerts."""

    def __init__(self):
        self.alerts: list[tuple[str, str]] = []

    def alert(self, title, text):
        self.alerts.append((title, text))


def _go_through(overrides, values, known=None):
    """Check one metric after the other; return what was on, and what was said at each.

    `known` are entropies of an earlier attempt, which had as many iterations.
    """
    session, _ = open_session(*overrides)
    log, told, found = _Alerts(), [], []
    session.output.view.warn = told.append  # type: ignore[method-assign]
    output = replace(session.output, log=log)  # type: ignore[arg-type]
    alarms = Alarms(session.run.settings, output, entropies=known)
    for iteration, metrics in enumerate(values, start=1 + len(known or {})):
        before = len(told)
        found.append((alarms.check(iteration, metrics), told[before:]))
    return found, log.alerts, told


@pytest.mark.parametrize("name", STATES)
def test_an_alarm_speaks_as_it_begins_and_again_only_after_it_had_ended(name):
    metric, key, past, fine = STATES[name]
    values = [{metric: value} for value in (fine, past, past, fine, past)] + [{}]
    [(found, alerts, told)] = run_ranks(1, _go_through, [f"{key}={LEVELS[name]}"], values)
    assert [now[f"alarm/{name}"] for now, _ in found] == [0, 1, 1, 0, 1, 0]
    assert [len(said) for _, said in found] == [0, 1, 0, 0, 1, 0]
    others = {f"alarm/{other}" for other in NAMES if other != name}
    assert all(now[other] == 0 for now, _ in found for other in others)
    assert [title for title, _ in alerts] == [f"{name} alarm"] * 2
    assert [text for _, text in alerts] == told
    assert told[0].startswith("iteration 2: ") and f"({key}={LEVELS[name]})" in told[0]


RISEN = [0.59, 0.61, 0.8, 0.4, 0.65]  # after a first mean of 0.3
ON = [0, 1, 1, 0, 1]


def _rises(overrides, entropies, known=None):
    values = [{"entropy": value} for value in entropies]
    [(found, _, told)] = run_ranks(1, _go_through, overrides, values, known)
    return [now["alarm/entropy_rise"] for now, _ in found], told


def test_an_entropy_of_twice_the_first_iterations_sets_off_an_alarm():
    on, told = _rises([], [0.2, 0.4] * (FIRST // 2) + RISEN)
    assert on == [0] * FIRST + ON
    assert len(told) == 2
    assert told[0].startswith("iteration 12: a rollout's mean entropy is 2.03 times that of the")
    assert told[0].endswith("turning into noise (resilience.entropy_rise_alarm=2.0)")
    on, told = _rises(["resilience.entropy_rise_alarm=3"], [0.3] * FIRST + [0.8, 0.95])
    assert on[FIRST:] == [0, 1] and told[0].endswith("(resilience.entropy_rise_alarm=3.0)")
    assert _rises(["resilience.entropy_rise_alarm=0"], [0.3] * FIRST + RISEN)[1] == []


def test_a_sharp_policy_may_double_its_entropy():
    """A tenth of log(83) is 0.44 nats; of a policy cut to 8 tokens, a tenth of log(8) is 0.21."""
    assert _rises([], [0.1] * FIRST + [0.3, 0.43, 0.45])[0][FIRST:] == [0, 0, 1]
    top_k = ["sampling.top_k=8"]
    assert _rises(top_k, [0.05] * FIRST + [0.15, 0.2, 0.22])[0][FIRST:] == [0, 0, 1]


def test_a_resumed_run_measures_the_rise_against_the_iterations_of_earlier_attempts():
    known = dict.fromkeys(range(1, FIRST + 1), 0.3)
    assert _rises([], RISEN, known)[0] == ON
    few = dict(list(known.items())[:4])
    assert _rises([], [0.3] * (FIRST - 4) + RISEN, few)[0] == [0] * (FIRST - 4) + ON


def test_levels_of_zero_set_off_no_alarm_of_shares_or_entropy():
    keys = ["resilience.entropy_alarm=0", "resilience.empty_alarm=0"]
    keys += ["resilience.zero_variance_alarm=0"]
    worst = {"entropy": 0.0, "completions/empty_fraction": 1.0, "zero_advantage_fraction": 1.0}
    [(found, _, told)] = run_ranks(1, _go_through, keys, [worst])
    assert told == [] and set(found[0][0].values()) == {0.0}
    assert [alarm.name for alarm in ALARMS] == NAMES


RUN = ["sft.iterations=0", "train.iterations=3", "evaluation.interval=0"]
RUN += ["logging.wandb=offline", "resilience.entropy_alarm=0.2"]


def _train(run_dir, overrides, fault=None):
    if fault is not None:
        fault()
    view, told = silent_view(), []
    view.warn = told.append  # type: ignore[method-assign]
    train(resolved_run(run_dir, *RUN, *overrides), view)
    return told


def _learn_to_say_nothing():
    """Let every solution be empty: all end-of-text."""

    def nothing(run, texts):
        return torch.full((len(texts), run.settings.sampling.completion_length), run.eos_id)

    drawn._padded = nothing


def _disagree():
    """Let the second iteration's rollout be off by a hundredth from what training computes."""
    plain = rl.update_policy

    def faulty(session, engine, rollout, *args, **options):
        trajectory = rollout.trajectory
        if trajectory.weights_version == 1:
            trajectory = replace(trajectory, logprobs=trajectory.logprobs - 0.01)
        return plain(session, engine, replace(rollout, trajectory=trajectory), *args, **options)

    rl.update_policy = faulty


def _alerts(run_dir):
    [path] = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    records = [r.alert for r in wandb_records(path) if r.WhichOneof("record_type") == "alert"]
    return [(alert.title, alert.text, alert.level) for alert in records]


def _on(run_dir):
    rows = [row for row in read(run_dir / "metrics.jsonl") if row["phase"] == "rl"]
    return {name: [row[f"alarm/{name}"] for row in rows] for name in NAMES}


def test_a_healthy_run_raises_no_alarm(tmp_path):
    [told] = run_ranks(1, _train, tmp_path / "run", [])
    assert told == [] and _alerts(tmp_path / "run") == []
    assert _on(tmp_path / "run") == {name: [0, 0, 0] for name in NAMES}


def test_a_policy_that_says_nothing_any_more_is_told_once(tmp_path):
    run_dir = tmp_path / "run"
    changes = ["sft.iterations=30", "sft.optimizer.learning_rate=3e-2"]
    [told] = run_ranks(1, _train, run_dir, changes, _learn_to_say_nothing)
    expected = {name: [float(name != "ratio")] * 3 for name in NAMES}
    quiet = ("mismatch", "mismatch_tail", "entropy_rise", "failed_rewards")
    expected |= {name: [0.0] * 3 for name in quiet}
    assert _on(run_dir) == expected
    keys = ["resilience.empty_alarm=0.5", "resilience.entropy_alarm=0.2"]
    keys += ["resilience.zero_variance_alarm=1.0"]
    assert len(told) == 3
    for text, key in zip(told, keys, strict=True):
        assert text.startswith("iteration 1: ") and text.endswith(f"({key})")
    said = ["empty", "entropy", "zero_variance"]
    alerts = [(f"{name} alarm", text, "WARN") for name, text in zip(said, told, strict=True)]
    assert _alerts(run_dir) == alerts


def test_a_rollout_that_training_does_not_agree_with_is_told(tmp_path):
    run_dir = tmp_path / "run"
    [told] = run_ranks(1, _train, run_dir, [], _disagree)
    assert _on(run_dir) == {name: [0, float(name == "ratio"), 0] for name in NAMES}
    [text] = told
    assert text.startswith("iteration 2: a first update's policy ratio is 1.0")
    assert text.endswith("rollout and training disagree (train.ratio_alarm=0.001)")
    assert _alerts(run_dir) == [("ratio alarm", text, "WARN")]


def _fail_in_the_third_iteration():
    plain = rl.update_policy

    def faulty(session, engine, rollout, *args, **options):
        if rollout.trajectory.weights_version == 2:
            raise RuntimeError("as asked")
        return plain(session, engine, rollout, *args, **options)

    rl.update_policy = faulty


def _attempt(run_dir, is_first):
    """Train; return the entropies that the alarms started with."""
    started = []

    class Noted(Alarms):
        def __init__(self, *args, entropies, **options):
            super().__init__(*args, entropies=entropies, **options)
            started.append(dict(entropies))

    rl.Alarms = Noted  # type: ignore[misc]
    fault = _fail_in_the_third_iteration if is_first else None
    with pytest.raises(RuntimeError, match="as asked") if is_first else nullcontext():
        _train(run_dir, ["checkpoint.interval=1"], fault)
    return started


def test_a_restart_reads_the_first_entropies_from_the_log(tmp_path):
    run_dir = tmp_path / "run"
    assert run_ranks(1, _attempt, run_dir, True) == [[{}]]
    rows = [row for row in read(run_dir / "metrics.jsonl") if row["phase"] == "rl"]
    expected = {row["iteration"]: row["entropy"] for row in rows}
    assert list(expected) == [1, 2]
    assert run_ranks(1, _attempt, run_dir, False) == [[expected]]
