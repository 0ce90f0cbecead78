"""The recipes of block models load, fit their machines, and say where each value comes from."""

import math
import re
from pathlib import Path

import pytest
import yaml

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.families import FAMILIES, hf_shapes
from agrpo_megatron.scaling.memory import worst_rank
from tests.test_recipes import NO_WEIGHTS, value_lines

EXAMPLES = Path(__file__).parent.parent / "examples"
# file: ranks, billions of weights, where values come from
RECIPES = {
    "sdar_8b/math": (8, 8.19, ("tracerl", "code", "config.json", "ours")),
    "nemotron_14b/gsm8k": (16, 13.5, ("config.json", "nemo", "vllm", "ours")),
}
FILES = {
    f"{folder}/{name}": sources
    for (folder, own), (_, _, sources) in ((k.split("/"), v) for k, v in RECIPES.items())
    for name in ("model", own)
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
    replicas = ranks // settings.parallel.tensor
    assert settings.algorithm.prompts_per_iteration * settings.algorithm.group_size % replicas == 0
    shapes = hf_shapes(settings.model).values()
    count = sum(math.prod(shape) for shape in shapes)
    assert count / 1e9 == pytest.approx(billions, rel=5e-3)
    assert FAMILIES[settings.model.family].config(settings.model), "the family has such a model"


@pytest.mark.parametrize("name", FILES)
def test_every_value_names_its_source(name):
    text = (EXAMPLES / f"{name}.yaml").read_text()
    lines = text.splitlines()
    for number in set(value_lines(yaml.compose(text))):
        found = re.search(r" # ([a-z0-9.]+): \S.+", lines[number])
        assert found and found[1] in FILES[name], f"{name}:{number + 1}: {lines[number]}"
