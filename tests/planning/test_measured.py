"""Speeds from made-up runs of known cost, and the fit behind them."""

import json
from dataclasses import replace

import pytest

from agrpo_megatron.config.schema import load, to_yaml
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.planning.cluster import Given, read_cluster
from agrpo_megatron.planning.fit import Fit, Work, fit
from agrpo_megatron.planning.measured import read_measured
from agrpo_megatron.planning.presets import open_model
from agrpo_megatron.planning.ranking import rank_layouts
from tests.training.tiny import TINY

TRUE = Fit(flops=1e-10, numbers=2e-9, drawn=0.0, layers=3e-5)
SENDING = replace(TRUE, messages=2e-4, sent=3e-8)  # of runs on several ranks
SIZES = {
    "base": [],
    "wide": ["model.hidden_size=64", "model.ffn_hidden_size=192"],
    "deep": ["model.num_layers=5"],
    "many": ["algorithm.prompts_per_iteration=9", "sampling.denoising_steps=8"],
    "tensors": ["parallel=tp2"],
    "wide tensors": ["parallel=tp2", "model.hidden_size=64", "model.ffn_hidden_size=192"],
    "data": ["parallel.data=2", "algorithm.prompts_per_iteration=8"],
    "other": ["model.num_layers=3", "model.hidden_size=32", "algorithm.mc_samples=3"],
}
ALONE = ("base", "wide", "deep", "many")  # given to the plan, on one rank
SPLIT = 0.25  # share of the seconds of a made-up iteration outside rollout and update


def ranked(settings_file, gpus, measured=None):
    model = open_model(str(settings_file), [], ranks=1)
    cluster = read_cluster(gpus, "bf16" if "H100" in gpus else "fp32", Given(peak=1.0))
    cluster = cluster if measured is None else cluster.with_measured(measured)
    return rank_layouts(model, cluster, only=load(Settings, settings_file).parallel)


def made_run(folder, name, *, gpus):
    """Write a run whose iterations took the seconds of `SENDING`; return them."""
    run = folder / name
    (run / "launch").mkdir(parents=True)
    given = ["precision=bf16"] if "H100" in gpus else []
    settings = load(Settings, None, [*TINY, *SIZES[name], *given])
    (run / "config.yaml").write_text(to_yaml(settings))
    ranks = int(gpus.partition("x")[0])
    (run / "launch" / "sections.json").write_text(json.dumps({"world_size": ranks}))
    ranking = ranked(run / "config.yaml", gpus)
    passes, flops = ranking.fitting[0].iteration, ranking.flops
    rollout = passes.rollout.batches.count * SENDING.seconds(passes.rollout.of.work)
    update = passes.update.micro_batches * SENDING.seconds(passes.update.of.work)
    update += SENDING.seconds(ranking.fitting[0].iteration.gradients)
    whole = rollout + update
    row = {"phase": "rl", "flops": flops.rollout + flops.update, "update_flops": flops.update}
    row |= {"timing/rollout": rollout, "timing/update": update, "timing/cpu": whole}
    row["timing/iteration"] = whole * (1 + SPLIT * ("H100" in gpus))
    lines = [json.dumps({**row, "iteration": number}) for number in range(1, 6)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return row["timing/iteration"]


@pytest.mark.parametrize("gpus", ["1xCPU", "1xH100"])
def test_runs_predict_sizes_that_were_not_measured(tmp_path, gpus):
    took = {name: made_run(tmp_path, name, gpus=gpus) for name in (*ALONE, "other")}
    files = [tmp_path / name for name in ALONE]
    cluster = read_cluster(gpus, "fp32", Given())
    measured = read_measured(files, cluster)
    assert (measured.rollout_share, measured.update_share) == pytest.approx((1, 1))
    for name in ("base", "other"):
        (one,) = ranked(tmp_path / name / "config.yaml", gpus, measured).fitting
        times = one.iteration.times
        assert one.seconds - times.rest == pytest.approx(
            took[name] / (1 + SPLIT * (times.rest > 0))
        )
        assert times.optimizer == 0 and (times.rest > 0) == ("H100" in gpus)


def test_runs_on_two_ranks_measure_what_sending_costs(tmp_path):
    for name in ALONE:
        made_run(tmp_path, name, gpus="1xCPU")
    took = {name: made_run(tmp_path, name, gpus="2xCPU") for name in SIZES if name not in ALONE}
    files = [tmp_path / name for name in (*ALONE, "tensors", "wide tensors")]
    measured = read_measured(files, read_cluster("1xCPU", "fp32", Given(peak=1.0)))
    assert vars(measured.rollout) == pytest.approx(vars(SENDING)) and measured.has_exchange
    assert "us a message" in measured.text
    for name in ("data", "wide tensors"):
        (one,) = ranked(tmp_path / name / "config.yaml", "2xCPU", measured).fitting
        assert one.seconds == pytest.approx(took[name])
        times = one.iteration.times
        sending = times.rollout_exchange + times.update_exchange + times.gradients
        assert 0 < sending < one.seconds
    alone = read_measured(files[:4], read_cluster("1xCPU", "fp32", Given(peak=1.0)))
    (one,) = ranked(tmp_path / "data" / "config.yaml", "2xCPU", alone).fitting
    assert not alone.has_exchange and one.iteration.times.gradients < 1e-4 < took["data"]


def test_one_run_is_a_rate_and_its_metrics_file_names_it(tmp_path):
    took = made_run(tmp_path, "base", gpus="1xCPU")
    cluster = read_cluster("1xCPU", "fp32", Given())
    measured = read_measured([tmp_path / "base" / "metrics.jsonl"], cluster)
    assert measured.rollout.numbers == measured.rollout.layers == 0
    (one,) = ranked(tmp_path / "base" / "config.yaml", "1xCPU", measured).fitting
    assert one.seconds == pytest.approx(took)


def test_a_benchmark_is_a_rate(tmp_path):
    file = tmp_path / "speed.json"
    file.write_text('notes\n{"kind": "iteration", "ours": {"flops": 4e12, "seconds_median": 2}}\n')
    measured = read_measured([file], read_cluster("8xH100", "bf16", Given()))
    assert measured.update.seconds(Work(6e12, 1e9, 1e9, 10)) == 3
    assert "2000 GFLOP/s" in measured.text and "speed.json (iteration)" in measured.text


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "neither a run directory nor the JSON"), ("text", "neither a run directory nor")],
)
def test_other_files_are_refused(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    cluster = read_cluster("1xCPU", "fp32", Given())
    with pytest.raises(ValueError, match=said):
        read_measured([tmp_path / "a.json"], cluster)
    with pytest.raises(ValueError, match="is not a run that was trained"):
        read_measured([tmp_path / "missing"], cluster)


def test_a_fit_has_no_negative_part_and_fewer_kinds_than_points():
    works = [Work(1e9, 1e6, 0, 10), Work(2e9, 9e6, 0, 10), Work(5e9, 2e6, 0, 40)]
    assert fit([(works[0], 2.0)]) == Fit(pytest.approx(2e-9))
    exact = [(work, TRUE.seconds(work)) for work in works]
    found = fit(exact)
    assert sum(value > 0 for value in vars(found).values()) <= 2
    falling = fit([(Work(1e9, 9e6, 0, 0), 1.0), (Work(2e9, 1e6, 0, 0), 2.2), (works[2], 5.5)])
    assert min(vars(falling).values()) >= 0 and falling.flops > 0
