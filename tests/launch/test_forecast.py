"""The forecast of `agrpo config` and `agrpo launch`: what it assumes, and what replaces that."""

import json

import pytest

from agrpo_megatron.cli.main import main
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.launch.forecast import forecast
from agrpo_megatron.launch.speed import Assumed, Speed, speed_of
from agrpo_megatron.runs.sizes import Sizes
from agrpo_megatron.scaling.forecast import work
from agrpo_megatron.scaling.forecast.disk import size
from tests.cli.test_main import write_settings
from tests.training.tiny import tiny

KNOWN = ["model.mask_token_id=1", "model.eos_token_id=2"]


def test_the_assumption_is_named_and_replaced():
    def text(precision="bf16", *, has_gpus=True, **assumed):
        found = speed_of(Assumed(**assumed), precision, has_gpus=has_gpus)
        return found.update, found.text

    published = "H100 SXM bf16 dense peak 989 TFLOP/s, published, at %s %% utilisation"
    assert text() == (pytest.approx(0.4 * 989e12), published % 40)
    assert text(mfu=0.25) == (pytest.approx(0.25 * 989e12), published % 25)
    assert text(rate="H100 PCIe")[1].startswith("H100 PCIe bf16 dense peak 756 TFLOP/s, published")
    assert text("fp8", rate="b200")[0] == pytest.approx(0.4 * 4500e12)
    assert text(rate="400", mfu=0.5) == (200e12, "400 TFLOP/s as given, at 50 % utilisation")
    for speed, said in (text("fp32"), text(has_gpus=False), text(rate="cpu")):
        assert 0 < speed < 1e14 and "CPU thread" in said


@pytest.mark.parametrize(
    ("assumed", "message"),
    [
        (Assumed(rate="TPU"), "--rate=TPU has no published bf16 rate; give TFLOP/s of one rank"),
        (Assumed(rate="-3"), "--rate=-3 has no published"),
        (Assumed(rate="nan"), "--rate=nan has no published"),
        (Assumed(mfu=40), "--mfu=40 must be from 0.0001 to 1; use for example 0.4"),
        (Assumed(mfu=0.0), "--mfu=0 must be from"),
        (Assumed(mfu=1e-320, rate="1e-10"), "--mfu=.* must be from"),
        (Assumed(rate="1e-320"), "--rate=1e-320 has no published"),
    ],
)
def test_wrong_assumptions_are_refused(assumed, message):
    with pytest.raises(ValueError, match=message):
        speed_of(assumed, "bf16")


def _run(folder, rows, *, ranks=2):
    (folder / "launch").mkdir()
    (folder / "launch" / "sections.json").write_text(json.dumps({"world_size": ranks}))
    lines = [json.dumps({"phase": "rl", "iteration": n + 1, **row}) for n, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))


ROW = {"flops": 10e9, "update_flops": 4e9, "timing/rollout": 3.0, "timing/update": 0.5}


def test_a_run_measures_each_part_on_each_of_its_ranks(tmp_path):
    """6 GFLOP in 3 s and 4 GFLOP in 0.5 s on two ranks; the first iteration does not count."""
    _run(tmp_path, [{**ROW, "timing/rollout": 99.0}, ROW, ROW, ROW])
    found = speed_of(Assumed(measured=tmp_path), "bf16")
    assert (found.rollout, found.update) == (1e9, 4e9)
    assert found.text.startswith("1 GFLOP/s in rollouts and 4 GFLOP/s in updates of each rank")
    with pytest.raises(ValueError, match="--measured replaces --rate and --mfu; leave them out"):
        speed_of(Assumed(mfu=0.4, measured=tmp_path), "bf16")


def test_a_run_that_measures_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run that was trained"):
        speed_of(Assumed(measured=tmp_path), "bf16")
    _run(tmp_path, [ROW, ROW])
    with pytest.raises(ValueError, match="has 1 iterations after the first; at least 3"):
        speed_of(Assumed(measured=tmp_path), "bf16")
    lines = [
        json.dumps({"phase": "rl", "iteration": n, **ROW, "update_flops": 0}) for n in range(5)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="made no rollouts or no updates"):
        speed_of(Assumed(measured=tmp_path), "bf16")


def test_times_follow_from_flops_ranks_and_speed():
    """Two ranks take half the time of one; sampling twice as fast halves the rollout again."""
    settings, sizes = tiny(*KNOWN, "train.iterations=10"), Sizes([5, 9], [6] * 40, 0)
    one = forecast(settings, sizes, Speed(1e6, 1e6, "slow"), world_size=1)
    two = forecast(settings, sizes, Speed(2e6, 1e6, "slow"), world_size=2)
    assert one[0].startswith("assumed   slow; ")
    assert [line.split()[0] for line in one] == ["assumed", "model", "iteration", "run", "disk"]
    first, second = (_seconds(lines[2]) for lines in (one, two))
    assert second[1] == pytest.approx(first[1] / 4, rel=0.05)  # rollout
    assert second[2] == pytest.approx(first[2] / 2, rel=0.05)  # update
    assert "rank-hours" in one[3] and "10 iterations, 2 evaluations of" in one[3]
    assert size(2.47e9) == "2.47 GB" and size(999) == "999 bytes"


def _seconds(line):
    """Return the seconds of an iteration, its rollout and its update."""
    words = line.replace(",", "").replace(":", "").split()
    return [float(words[words.index(name) + 1]) for name in ("iteration", "rollout", "update")]


def test_a_failing_estimator_of_the_user_stops_no_plan(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def score(rollout, context):\n    raise KeyError('steps')\n")
    settings = tiny(*KNOWN, f"algorithm.name={mine}:score")
    lines = forecast(settings, Sizes([5], [5], 0), Speed(1, 1, ""), world_size=1)
    assert lines == ["forecast  not possible: KeyError: 'steps'"]


def test_a_fault_of_this_package_is_not_hidden(monkeypatch):
    def fails(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(work, "count_flops", fails)
    with pytest.raises(ZeroDivisionError):
        forecast(tiny(*KNOWN), Sizes([5], [5], 0), Speed(1, 1, ""), world_size=1)


def test_config_prints_a_forecast_that_leaves_the_settings_readable(tmp_path, capsys):
    file = write_settings(tmp_path / "good.yaml")
    assert main(["config", str(file), "--rate", "0.001"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert load(Settings, tmp_path / "again.yaml").train.iterations == 3
    comments = [line for line in printed.splitlines() if line.startswith("# ")]
    words = ["forecast", "assumed", "model", "iteration", "run", "disk", "memory"]
    assert [line.split()[1] for line in comments] == words
    assert "0.001 TFLOP/s as given, at 40 % utilisation" in comments[1]
    assert main(["config", str(file), "--mfu", "40"]) == 2
    assert capsys.readouterr().out == ""


def test_launch_shows_the_forecast_of_its_ranks(launch, no_slurm, tmp_path):
    file = write_settings(tmp_path / "good.yaml", run={"dir": str(tmp_path / "run")})
    words = ["--nodes", 2, "--dry-run", "launch.gpus_per_node=0", "launch.ranks_per_node=1"]
    status, script, errors = launch(file, *words, "--rate", "cpu", "--mfu", "0.5")
    assert (status, errors) == (0, "")
    assert "CPU thread" in script and "at 50 % utilisation" in script
    assert "# iteration " in script and "# run       " in script and "# disk      " in script


def test_config_and_launch_warn_of_odd_values(launch, no_slurm, capsys, tmp_path):
    file = write_settings(tmp_path / "s.yaml", run={"dir": str(tmp_path / "run")})
    words = ["sampling.temperature=3", "algorithm.mc_samples=9"]
    assert main(["config", str(file), *words]) == 0
    errors = capsys.readouterr().err
    assert "warning: algorithm.mc_samples=9 is more than the 4 denoising steps" in errors
    assert "warning: sampling.temperature=3 draws mostly noise" in errors
    cpu = ["launch.gpus_per_node=0", "--nodes", 1, "--dry-run"]
    status, script, errors = launch(file, *cpu, *words)
    assert (status, errors) == (0, "")
    assert "# warning   sampling.temperature=3 draws mostly noise" in script
