"""Odd values are named in one line each; no shipped example has one."""

import json
import runpy
from dataclasses import replace

import pytest

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.yaml_files import read_yaml
from agrpo_megatron.runs.odd_values import odd_values
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.runs.sizes import Sizes, measure
from tests.cli.test_main import ROOT
from tests.test_recipes import NO_WEIGHTS

GRIDS = ("sweep.yaml", "layouts.yaml")  # values of sweeps
EXAMPLES = sorted(
    path.relative_to(ROOT / "examples")
    for path in ROOT.glob("examples/**/*.yaml")
    if path.parent.name not in ("estimators", "compare") and path.name not in GRIDS
)
ESTIMATORS = sorted(path.name for path in ROOT.glob("examples/estimators/*.yaml"))
RANKS = {"llada2_flash": 128, "sdar_30b": 32, "shapes": 32}
KNOWN = ["model.mask_token_id=1", "model.eos_token_id=2", "model.vocab_size=64"]
# What each odd value is, in an otherwise good run; and what its line says.
ODD = {
    "train.token_budget=40": "train.token_budget=40 is under the 66 tokens of a row",
    "algorithm.mc_samples=50": "algorithm.mc_samples=50 is more than the 12 denoising steps",
    "optimizer.learning_rate=50": "optimizer.learning_rate=50 is 10 times what all weights of",
    "sft.optimizer.learning_rate=0.05": "sft.optimizer.learning_rate=0.05 is 10 times what",
    "algorithm.group_size=2": "algorithm.group_size=2 compares each completion with one other",
    "evaluation.interval=1": "evaluation.interval=1 evaluates 81 times, with 2.0 times",
    "model.init_std=0.02": "is about 1 / sqrt(hidden_size) = 0.12",
    "model.rope_theta=500000": "model.rope_theta=500000 hardly distinguishes the positions of 66",
    "sampling.completion_length=96": "sampling.completion_length=96 is far over the longest",
    "sampling.temperature=2": "sampling.temperature=2 draws mostly noise; usual are 0.6 to 1.0",
    "sampling.temperature=0.1": "sampling.temperature=0.1 draws nearly equal completions",
    "optimizer.warmup_iterations=80": "optimizer.warmup_iterations=80 is cut to 79, as there are",
}
SIZES = Sizes(train=[42] * 8, held_out=[42] * 256, longest_solution=23)


def tiny(*overrides):
    return load(Settings, ROOT / "examples" / "tiny.yaml", [*KNOWN, *overrides])


@pytest.mark.parametrize("override", ODD)
def test_an_odd_value_is_one_line_that_names_it_and_what_is_usual(override):
    (line,) = odd_values(tiny(override), SIZES, world_size=1)
    assert ODD[override] in line and line.startswith(override.partition("=")[0])
    assert "usual" in line and "\n" not in line


def test_adapters_and_large_models_have_learning_rates_of_their_own():
    file = ROOT / "examples" / "llada_8b" / "gsm8k.yaml"

    def lines(*overrides):
        settings = load(Settings, file, [NO_WEIGHTS, *overrides])
        return odd_values(settings, replace(SIZES, longest_solution=0), world_size=8)

    assert lines("optimizer.learning_rate=1e-3") == []
    (line,) = lines("optimizer.learning_rate=2e-3")
    assert "adapters of a model of 8.02e+03M parameters take, or more; usual are 0.0002" in line
    assert len(lines("optimizer.learning_rate=1e-3", "lora=null", "parallel=tp2-sp")) == 1
    assert (
        "train.token_budget=65536 takes 379 GiB of activations in a rank, over launch"
        in (lines("train.token_budget=65536")[0])
    )


def test_a_phase_that_does_not_train_has_no_odd_values():
    of_rl = ["algorithm.group_size=2", "sampling.temperature=2", "optimizer.warmup_iterations=80"]
    for words, phase in ((of_rl, "rl"), (["sft.optimizer.learning_rate=0.05"], "sft")):
        settings, other = tiny(*words), {"rl": "sft", "sft": "rl"}[phase]
        assert len(odd_values(settings, SIZES, world_size=1, phases=(phase,))) == len(words)
        assert odd_values(settings, SIZES, world_size=1, phases=(other,)) == []
    assert odd_values(tiny(*of_rl, "train.iterations=0"), SIZES, world_size=1) == []


def test_what_fits_its_reason_is_not_odd():
    def lines(*overrides):
        return odd_values(tiny(*overrides), SIZES, world_size=1)

    assert lines() == lines("model.init_std=0.02", "model.load=runs/x") == []
    assert lines("sampling.completion_length=96", "sft.iterations=0") == []
    pairs = ["algorithm.name=vrpo", "algorithm.group_size=2", "algorithm.mc_samples=null"]
    assert lines(*pairs, "evaluation.interval=50") == []


@pytest.mark.parametrize("name", EXAMPLES, ids=str)
def test_no_example_has_an_odd_value(name, tmp_path, monkeypatch):
    """Recipes without their weights and data: prompts of 200 tokens, as many as GSM8K has."""
    if (maker := ROOT / "examples" / name.parent / "make_data.py").exists():
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(maker), run_name="__main__")
    settings = load(Settings, ROOT / "examples" / name)
    ranks = RANKS.get(name.parent.name, 8)
    if settings.model.load is not None:
        own = () if settings.model.vocab_size else ("model.num_layers=3", *KNOWN)
        settings = load(Settings, ROOT / "examples" / name, [NO_WEIGHTS, *own])
        sizes = Sizes([200] * 8, [200] * 1319, 0)
        if own:  # the demo's model
            settings, sizes = replace(settings, model=replace(tiny().model, load="x")), SIZES
    else:
        ranks = RANKS.get(name.parent.name, 1)
        planned = resolve(settings, world_size=ranks)
        settings, sizes = planned.settings, measure(planned)
    assert odd_values(settings, sizes, world_size=ranks) == []


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_published_estimator_has_an_odd_value(name):
    """Their files hold only the estimator's settings; here with those of LLaDA-8B."""
    tree = read_yaml(ROOT / "examples" / "estimators" / name)
    words = [f"{section}={json.dumps(part)}" for section, part in tree.items()]
    file = ROOT / "examples" / "llada_8b" / "model.yaml"
    settings = load(Settings, file, ["model.load=x", *words])
    assert odd_values(settings, Sizes([200] * 8, [200] * 100, 0), world_size=8) == []
