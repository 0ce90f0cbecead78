"""The recipes of block models load, fit their machines, and say where each value comes from."""

import math
import re
from pathlib import Path

import pytest
import yaml

from agrpo_megatron.config.parallel import data_ranks
from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.families import FAMILIES, hf_shapes
from agrpo_megatron.scaling.memory import worst_rank
from tests.test_recipes import NO_WEIGHTS, differences, value_lines

EXAMPLES = Path(__file__).parent.parent / "examples"
LLADA2 = ("config.json", "report", "code", "ours")
# file: ranks, billions of weights, where values come from
RECIPES = {
    "sdar_8b/math": (8, 8.19, ("tracerl", "code", "config.json", "ours")),
    "nemotron_14b/gsm8k": (16, 13.5, ("config.json", "nemo", "vllm", "ours")),
    "sdar_30b/math": (8, 30.5, ("tracerl", "code", "config.json", "ours")),
    "sdar_30b/math_4_nodes": (32, 30.5, ("ours",)),
    "llada2_mini/gsm8k": (8, 16.3, LLADA2),
    "llada2_mini/gsm8k_4_nodes": (32, 16.3, ("ours",)),
    "llada2_flash/gsm8k": (128, 102.9, LLADA2),
}
FILES = {
    f"{folder}/{name}": sources
    for (folder, own), (_, _, sources) in ((k.split("/"), v) for k, v in RECIPES.items())
    for name in ("model", own)
    if not own.endswith("_nodes") or name == own
}


def test_every_file_is_tested():
    folders = {name.split("/")[0] for name in RECIPES}
    found = {f"{d}/{path.stem}" for d in folders for path in (EXAMPLES / d).glob("*.yaml")}
    assert found == set(FILES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_fits_the_machine_it_names(name):
    ranks, billions, _ = RECIPES[name]
    settings = load(Settings, EXAMPLES / f"{name}.yaml", [NO_WEIGHTS])
    validate(settings, ranks)
    assert worst_rank(settings, ranks).total < 0.9 * 80 * 2**30
    replicas = data_ranks(settings.parallel, ranks)
    assert settings.algorithm.prompts_per_iteration * settings.algorithm.group_size % replicas == 0
    shapes = hf_shapes(settings.model).values()
    count = sum(math.prod(shape) for shape in shapes)
    assert count / 1e9 == pytest.approx(billions, rel=5e-3)
    assert FAMILIES[settings.model.family].config(settings.model), "the family has such a model"


@pytest.mark.parametrize("name", ["sdar_30b/math", "llada2_mini/gsm8k"])
def test_on_four_nodes_a_run_sees_as_many_problems(name):
    one, four = (load(Settings, EXAMPLES / f"{name}{end}.yaml") for end in ("", "_4_nodes"))
    changed = {"run.dir", "algorithm.prompts_per_iteration", "optimizer.learning_rate"}
    changed |= {"optimizer.warmup_iterations", "train.iterations", "evaluation.interval"}
    layout = {"parallel.tensor", "parallel.sequence", "model.megatron"}
    assert changed <= differences(one, four) <= changed | layout | {"optimizer.moments"}
    assert four.algorithm.prompts_per_iteration == 4 * one.algorithm.prompts_per_iteration
    assert four.optimizer.learning_rate == 2 * one.optimizer.learning_rate
    assert (4 * four.train.iterations, 4 * four.evaluation.interval) == (
        one.train.iterations,
        one.evaluation.interval,
    )


@pytest.mark.parametrize("name", FILES)
def test_every_value_names_its_source(name):
    text = (EXAMPLES / f"{name}.yaml").read_text()
    lines = text.splitlines()
    for number in set(value_lines(yaml.compose(text))):
        found = re.search(r" # ([a-z0-9.]+): \S.+", lines[number])
        assert found and found[1] in FILES[name], f"{name}:{number + 1}: {lines[number]}"
