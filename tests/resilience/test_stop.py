"""Ranks that are asked to stop do so at one point and save; a restart ends in the same bits."""

import os
import signal
import time

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from agrpo_megatron.resilience import failure
from agrpo_megatron.resilience.sections import Sections
from agrpo_megatron.resilience.stop import CTRL_C, JOB_END, LEAST_MARGIN, Stop, Stopped, Turns
from agrpo_megatron.resilience.store import RankStore
from agrpo_megatron.rollout import generate
from agrpo_megatron.rollout.cache import CompletionWriter, RolloutCache
from agrpo_megatron.runs.log import RunLog
from agrpo_megatron.runs.progress import latest_checkpoint
from agrpo_megatron.training.run import train
from tests.ranks import run_ranks
from tests.training.test_run import read
from tests.training.tiny import resolved_run, same_metrics, silent_view

# Rows of a rollout end at different turns: one forward holds few of them.
RUN = [
    "sft.iterations=3",
    "train.iterations=3",
    "evaluation.interval=2",
    "checkpoint.interval=0",
    "checkpoint.best=null",
    "train.token_budget=64",
    "sampling.top_k=9",
]
LINES = 9  # sft 1-3, evaluation before, rl 1, rl 2, evaluation, rl 3, evaluation after
LAYOUTS = {"one rank": (1, []), "dp2": (2, []), "tp2": (2, ["parallel=tp2"])}
LAYOUTS["pp2"] = (2, ["parallel=pp2", "rollout.groups=4"])
# What asks, where: in which sampling (0: evaluation before), and how many turns into it; or after
# which metric line; or which evaluation's sampling.
MOMENTS = {
    "within the first evaluation": (0, 3),
    "within the first rollout": (1, 6),
    "within the second rollout": (2, 9),
    "within an evaluation between": (3, 3),
    "within the last evaluation": (5, 2),
    "in the supervised phase": "line 2",
    "after an iteration": "line 5",
}
# Each moment at two layouts, and an evaluation, a rollout and a line at each layout.
ASKED = {
    "within the first evaluation": ("one rank", "tp2"),
    "within the first rollout": ("dp2", "tp2"),
    "within the second rollout": ("one rank", "pp2"),
    "within an evaluation between": ("dp2", "pp2"),
    "within the last evaluation": ("one rank", "pp2"),
    "in the supervised phase": ("dp2", "pp2"),
    "after an iteration": ("one rank", "tp2"),
}


class AskedTurns(Turns):
    """Send the signal to this process, on the last rank alone, at a chosen turn of a sampling."""

    when: tuple[int, int] | None = None
    samplings = turns = 0

    def __init__(self, *args):
        super().__init__(*args)
        AskedTurns.samplings, AskedTurns.turns = AskedTurns.samplings + 1, 0

    def is_asked(self):
        AskedTurns.turns += 1
        is_last = dist.get_rank() == dist.get_world_size() - 1
        if is_last and (AskedTurns.samplings - 1, AskedTurns.turns) == self.when:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().is_asked()


def test_a_failing_rank_outlives_the_launcher_until_it_has_printed_its_error(monkeypatch):
    """The launcher's SIGTERM may come while an error is on its way to who prints it."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]

    def leave_by(error):
        with pytest.raises(type(error)), Stop(Sections([])).listening():
            raise error
        found = [signal.getsignal(number) for number in numbers]
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        return found

    assert leave_by(RuntimeError("closed by peer")) == before  # one rank
    monkeypatch.setattr(failure, "_command", failure.Command(RankStore(None, 0, 2), print))
    assert leave_by(Stopped("asked by SIGTERM")) == before
    assert leave_by(RuntimeError("closed by peer")) == [signal.SIG_IGN, signal.SIG_IGN]


def _signal_after_line(number):
    """Send the signal once rank 0 has written so many metric lines."""
    own, written = RunLog.metrics, []

    def metrics(self, record):
        own(self, record)
        written.append(record)
        if len(written) == number and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    RunLog.metrics = metrics


def _train(run_dir, overrides, moment=None):
    """Train; return why it stopped, and the cached completions that each sampling found."""
    if isinstance(moment, str):
        _signal_after_line(int(moment.split()[1]))
    elif moment is not None:
        AskedTurns.when = moment
        generate.Turns = AskedTurns
    found: list[tuple[str, int]] = []
    own = RolloutCache.find_completions

    def find(self, name, rollout_ids, **options):
        cached = own(self, name, rollout_ids, **options)
        found.append((name, 0 if cached is None else len(cached.prompts)))
        return cached

    RolloutCache.find_completions = find
    resolved = resolved_run(run_dir, *RUN, *overrides, world_size=dist.get_world_size())
    return train(resolved, silent_view()), found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the finished run of a layout, made when it is first asked for."""
    made = {}

    def of(layout):
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("whole") / "run"
            ranks, overrides = LAYOUTS[layout]
            assert {why for why, _ in run_ranks(ranks, _train, made[layout], overrides)} == {None}
        return made[layout]

    return of


def _check(run, whole):
    metrics, expected = read(run / "metrics.jsonl"), read(whole / "metrics.jsonl")
    assert len(expected) == LINES
    bubbles = [record.pop("rollout/bubble", None) for record in (*metrics, *expected)]
    assert same_metrics(metrics, expected), bubbles
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert not list((run / "rollouts").iterdir())


def _check_tokens(run, whole):
    """Compare what was sampled; sums over ranks of another layout round differently."""
    ours, theirs = read(run / "samples.jsonl"), read(whole / "samples.jsonl")
    assert ours[-1]["iteration"] == theirs[-1]["iteration"]
    first = [record for record in theirs if record.get("iteration", 0) <= 2]
    keys = ("phase", "iteration", "prompt", "completion", "unmask_step", "reward")
    assert [[r[k] for k in keys] for r in ours[: len(first)]] == [
        [r[k] for k in keys] for r in first
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "layout"), [(m, at) for m in ASKED for at in ASKED[m]])
def test_a_run_that_is_asked_to_stop_goes_on_to_the_same_bits(
    undisturbed, tmp_path, layout, moment
):
    ranks, overrides = LAYOUTS[layout]
    run, when = tmp_path / "run", MOMENTS[moment]
    stopped = run_ranks(ranks, _train, run, overrides, when)
    reasons = {why for why, _ in stopped}
    signal_name = "SIGTERM" if isinstance(when, str) else "SIGUSR1"
    assert reasons == {f"asked by {signal_name}"}
    assert len(read(run / "metrics.jsonl")) < LINES
    samplings = [name for name, _ in stopped[0][1]]
    kept = _written(run / "rollouts", samplings[-1])[0] if samplings else 0
    again = run_ranks(ranks, _train, run, overrides)
    assert {why for why, _ in again} == {None}
    _check(run, undisturbed(layout))
    if not isinstance(when, str):  # only the missing completions of that sampling are sampled
        assert dict(again[0][1])[samplings[-1]] == kept


def _written(folder, name):
    """Return how many completions of a sampling are on disk, and their rollout ids."""
    parts = [load_file(part) for part in folder.glob(f"{name}-*.part")]
    ids = [number for part in parts for number in part["rollout_ids"].tolist()]
    return len(ids), sorted(ids)


def _killed_when_written(run_dir, count):
    """Kill the process without a word in the middle of a rollout, once so many are on disk."""
    own, folder = CompletionWriter.add, run_dir / "rollouts"

    def add(self, part):
        self._free_at = 0.0
        own(self, part)
        if _written(folder, "000001")[0] >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    CompletionWriter.add = add
    return _train(run_dir, [])


@pytest.mark.slow
def test_a_kill_within_a_rollout_costs_no_complete_row(undisturbed, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match="killed by signal 9"):
        run_ranks(1, _killed_when_written, run, 2)
    complete, ids = _written(run / "rollouts", "000001")
    assert 2 <= complete < 12 and len(set(ids)) == complete
    ((why, found),) = run_ranks(1, _train, run, [])
    assert why is None and ("000001", complete) in found
    _check(run, undisturbed("one rank"))


@pytest.mark.slow
def test_a_damaged_file_is_sampled_again_and_another_layout_takes_the_rest(undisturbed, tmp_path):
    run, when = tmp_path / "run", MOMENTS["within the second rollout"]
    run_ranks(2, _train, run, [], when)
    count, _ = _written(run / "rollouts", "000001")
    parts = sorted((run / "rollouts").glob("000001-*.part"))
    damaged = len(load_file(parts[0])["rollout_ids"])
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    ((_, found),) = run_ranks(1, _train, run, [])
    assert ("000001", count - damaged) in found and damaged > 0
    _check_tokens(run, undisturbed("one rank"))


def _time_is_up(run_dir):
    os.environ[JOB_END] = str(time.time() + 3600)
    return _train(run_dir, ["resilience.stop_margin=3601"])[0]


def test_a_job_whose_time_is_nearly_up_stops_and_saves(tmp_path):
    (why,) = run_ranks(1, _time_is_up, tmp_path / "run")
    assert why.startswith("the job's time is up in 3")
    path, progress = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert (path.name, progress.iteration) == ("sft-000001", 1)


def _press(stop, times):
    with stop.listening():
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
    return stop.reason


def test_ctrl_c_asks_to_stop_and_a_second_one_ends_at_once(capfd):
    stop = Stop(Sections())
    assert _press(stop, 1) == CTRL_C == "interrupted by Ctrl-C"
    assert "press it again to end at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        _press(stop, 1)
    stop = Stop(Sections())
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert _press(stop, 1) == CTRL_C  # it was not pressed before


def test_a_launcher_passes_a_second_ctrl_c_on_as_sigterm(monkeypatch, capfd):
    def pressed_twice():
        with (stop := Stop(Sections())).listening():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return stop.reason

    monkeypatch.setenv("RANK", "1")
    assert pressed_twice() == CTRL_C  # without a launcher SIGTERM is one more request
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(KeyboardInterrupt):
        pressed_twice()
    assert capfd.readouterr().err == ""  # rank 0 says it


def test_the_margin_is_learned(monkeypatch):
    sections = Sections()
    monkeypatch.setenv(JOB_END, str(time.time() + 100))
    stop = Stop(sections)
    assert stop.margin == LEAST_MARGIN and stop.reason is None
    sections.learn({"update": 40.0, "checkpoint": 25.0, "rollout": 1e6})
    assert stop.margin == LEAST_MARGIN + 97.5 and stop.reason is not None
