"""Model families: conversion of Hugging Face configurations and weight names to ours and back.

A family is one file with `FAMILY`, a `Family` record. `FAMILIES` has them by `model_type`.
"""

import json
from pathlib import Path

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.dream import FAMILY as DREAM
from agrpo_megatron.families.llada import FAMILY as LLADA
from agrpo_megatron.families.tensors import Family, Shapes, WeightMapping, expand, part_shapes

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA, DREAM)}


def settings_from_hf(directory: str | Path) -> ModelSettings:
    """Read the model settings of a Hugging Face directory.

    Raises:
        ValueError: config.json is missing, or of an unknown family.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        fix = "give a Hugging Face directory"
        raise ValueError(f"{path}: cannot be read ({error}); {fix}") from None
    family = FAMILIES.get(str(kind).lower())  # Dream's has a capital letter
    if family is None:
        raise ValueError(f"{path}: model_type={kind!r}; known families are {', '.join(FAMILIES)}")
    return family.settings(config)


def weight_mappings(model: ModelSettings) -> list[WeightMapping]:
    """Return one mapping for each Megatron parameter of the whole model."""
    return expand(FAMILIES[model.family].mappings(model), model.num_layers)


def hf_shapes(model: ModelSettings) -> Shapes:
    """Return the shape of every Hugging Face tensor, by name."""
    return part_shapes(weight_mappings(model), model)
