"""`agrpo plan` in this process: its text, its JSON, its file, and what it refuses."""

import json

import pytest

from agrpo_megatron.cli.main import main
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.planning.presets import PRESETS, open_model
from agrpo_megatron.scaling.forecast.disk import parameters
from tests.cli.test_main import ROOT
from tests.families.test_dream import DREAM_7B

SMALL = ["llada-8b", "--gpus", "8xH100"]
# Billions of parameters, by name.
SIZES = {"llada-8b": 8.02, "dream-7b": 7.62, "sdar-8b": 8.19, "sdar-30b-a3b": 30.5}
SIZES |= {"nemotron-14b": 13.5, "llada2-mini": 16.3, "llada2-flash": 102.9}
SIZES |= {"13b": 14.0, "34b": 35.3, "70b": 70.5}


def agrpo(capsys, *arguments):
    """Return the exit status of `agrpo plan` and what it printed."""
    status = main(["plan", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_plan_says_what_fits_why_and_what_it_costs(capsys):
    status, printed, _ = agrpo(capsys, *SMALL, "--price", "2", "--watts", "1000", "--rows", "3")
    assert status == 0
    for part in ("model     llada-8b: 8.02B parameters", "machine   8 x H100", "989 TFLOP/s"):
        assert part in printed
    for part in ("first     ", "with      ", "too large ", "at 2 a GPU-hour", "kWh at 1000 W"):
        assert part in printed
    assert "prompts of 256 tokens, completions of 256 in 128 denoising steps" in printed
    assert sum(line.startswith("  tp") for line in printed.splitlines()) == 3
    assert printed.splitlines()[-1].startswith("launch    agrpo launch FILE")


def test_json_has_all_layouts_and_costs_add_up(capsys):
    _, printed, _ = agrpo(capsys, *SMALL, "--json", "--price", "2", "--watts", "700")
    found = json.loads(printed)
    first = found["layouts"][0]
    assert first["seconds"] == pytest.approx(sum(first["times"].values()))
    assert first["memory_total"] == sum(v for k, v in first["memory"].items() if k != "host")
    costs, hours = first["costs"], 1000 * first["seconds"] / 3600
    assert costs["gpu_hours"] == pytest.approx(8 * hours)
    assert costs["cost"] == pytest.approx(2 * 8 * hours)
    assert costs["kwh"] == pytest.approx(0.7 * 8 * hours)
    assert len(found["layouts"]) > 20 and found["too_large"]


def test_the_file_of_a_plan_is_a_settings_file_with_its_layout(capsys, tmp_path):
    file, small = tmp_path / "plan.yaml", ["dream-7b", "--gpus", "8xH200"]
    given = ["--completion-length", "512", "algorithm.mc_samples=4", "--json"]
    status, printed, _ = agrpo(capsys, *small, *given, "--output", str(file))
    assert status == 0 and main(["config", str(file), "--ranks", "8"]) == 0
    assert "qkv_bias: true" in capsys.readouterr().out
    settings = load(Settings, file)
    name = json.loads(printed)["layouts"][0]["layout"]
    assert name.startswith(f"tp{settings.parallel.tensor}-")
    assert settings.sampling.completion_length == 512 == settings.sampling.block_length
    assert settings.sampling.denoising_steps == 256 and settings.algorithm.mc_samples == 4
    assert settings.launch.gpu_memory == 140
    status, _, said = agrpo(capsys, *small, "--output", str(file))
    assert status == 2 and "exists; remove it" in said


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_hugging_face_directory_is_planned_without_its_weights(capsys, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(DREAM_7B))
    given = ["--gpus", "8xH200", "--output", str(tmp_path / "plan.yaml"), "--rows", "1"]
    status, printed, _ = agrpo(capsys, str(tmp_path / name), *given)
    assert status == 0 and "7.62B parameters, 7.62B trained, bf16" in printed
    settings = load(Settings, tmp_path / "plan.yaml")
    assert settings.model.load == str(tmp_path) and settings.model.qkv_bias
    assert settings.precision == "bf16" and settings.optimizer.distributed


def test_a_settings_file_is_planned_with_the_prompts_of_its_task(capsys):
    file = str(ROOT / "examples" / "tiny.yaml")
    status, printed, _ = agrpo(capsys, file, "--gpus", "2xCPU", "--layout", "tp2")
    assert status == 0 and "completions of 24 in 12 denoising steps" in printed
    assert "128 completions an iteration (16 prompts, groups of 8)" in printed


def test_a_measured_speed_replaces_the_assumed_one(capsys, tmp_path):
    file = tmp_path / "speed.json"
    file.write_text('{"kind": "iteration", "ours": {"flops": 3e14, "seconds_median": 1}}')
    _, printed, _ = agrpo(capsys, *SMALL, "--measured", str(file), "--layout", "tp2-sp", "--json")
    found = json.loads(printed)
    (one,) = found["layouts"]
    assert "products at 3e+05 GFLOP/s" in found["assumed"][0]
    assert one["times"]["update"] == pytest.approx(found["flops"]["update"] / 8 / 3e14)
    assert one["times"]["optimizer"] == 0 < one["times"]["update_exchange"]
    status, _, said = agrpo(capsys, *SMALL, "--measured", str(tmp_path / "missing"))
    assert status == 2 and "is not a run that was trained" in said


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_their_parameters(name):
    model = open_model(name, [], ranks=8)
    assert parameters(model.settings)[0] / 1e9 == pytest.approx(SIZES[name], rel=5e-3)
    assert SIZES.keys() == PRESETS.keys()


def test_a_model_that_fits_nowhere_is_said_so_with_what_helps(capsys):
    status, printed, _ = agrpo(capsys, "70b", "--gpus", "8xH100")
    assert status == 1 and "nothing fits: use more GPUs" in printed and "launch" not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt", "--gpus", "8xH100"], "MODEL=gpt is neither a preset nor a file"),
        (["70b", "--gpus", "8H100"], "--gpus=8H100 is not a number and a kind of GPU"),
        (["70b", "--gpus", "8xV100"], "one of A100, H100, H200, B200, CPU"),
        ([*SMALL, "--mfu", "2"], "--mfu=2 must be from 0.0001 to 1"),
        ([*SMALL, "--price", "0"], "--price=0 must be positive"),
        ([*SMALL, "--rows", "0"], "--rows=0 must be from 1"),
        ([*SMALL, "--gpus-per-node", "0"], "--gpus-per-node=0 must be"),
        ([*SMALL, "--prompt-length", "9999"], "--prompt-length=9999 and a completion of 256"),
        ([*SMALL, "--completion-length", "0"], "--completion-length=0 must be at least 1"),
        ([*SMALL, "--layout", "tp3"], "does not divide"),
        ([*SMALL, "--layout", "tp2", "parallel.tensor=2"], "parallel.tensor=2: a plan chooses"),
        ([*SMALL, "launch.gpu_memory=40"], "launch.gpu_memory=40: a plan writes it; use --memory"),
        (["llada-8b", "--gpus", "8xA100", "precision=fp8"], "A100 has no fp8 products"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, said):
    status, printed, error = agrpo(capsys, *arguments)
    assert (status, printed) == (2, "") and error.count("\n") == 1 and said in error
