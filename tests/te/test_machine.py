"""Which FP8 recipes a GPU supports: our rule against Transformer Engine's own check."""

from itertools import product

import pytest
import torch
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch import quantization

from agrpo_megatron.hardware.machine import Machine, fp8_missing, recipe_missing, release

RECIPES = {
    "blockwise": recipes.Float8BlockScaling,
    "tensorwise": recipes.Float8CurrentScaling,
    "delayed": recipes.DelayedScaling,
    "mxfp8": recipes.MXFP8BlockScaling,
}
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
VERDICTS = ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT")


def has_recipe(recipe, monkeypatch):
    """Query Transformer Engine without its cache."""
    for verdict in VERDICTS:
        monkeypatch.setattr(quantization, verdict, None)
    try:
        quantization.check_recipe_support(RECIPES[recipe]())
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("cuda", ["12.8", "12.9", "13.0"])
def test_recipes_are_refused_where_transformer_engine_refuses_them(cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(quantization.tex, "get_cublasLt_version", lambda: 120900)
    found = set()
    for capability, recipe in product(CAPABILITIES, RECIPES):
        monkeypatch.setattr(
            quantization, "get_device_compute_capability", lambda answer=capability: answer
        )
        here = Machine("GPU", capability, release(cuda), te="2.20.2", te_problem="")
        ours = not (fp8_missing(here) or recipe_missing(recipe, here))
        theirs = has_recipe(recipe, monkeypatch)
        assert ours == theirs, (capability, recipe)
        found.add(ours)
    assert found == {True, False}
