"""Model families: conversion of Hugging Face configurations and weight names to ours and back.

A family is one file with `FAMILY`, a `Family` record. `FAMILIES` has them by name.
"""

from pathlib import Path

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.config_json import CONFIG, GENERATION, check_ids, read_object, shown
from agrpo_megatron.families.dream import FAMILY as DREAM
from agrpo_megatron.families.llada import FAMILY as LLADA
from agrpo_megatron.families.nemotron_diffusion import FAMILY as NEMOTRON
from agrpo_megatron.families.sdar import FAMILY as SDAR
from agrpo_megatron.families.tensors import Family, Shapes, WeightMapping, expand, part_shapes

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA, DREAM, SDAR, NEMOTRON)}
_BY_TYPE = {family.model_type or family.name: family for family in FAMILIES.values()}


def settings_from_hf(directory: str | Path) -> ModelSettings:
    """Read the model settings of a Hugging Face directory; the weights stay closed.

    Raises:
        ValueError: config.json is missing, of an unknown family, has a key that the family lacks,
            or disagrees with generation_config.json.
    """
    path = Path(directory) / CONFIG
    config = read_object(path)
    kind = config.get("model_type")
    family = _BY_TYPE.get(str(kind).lower())  # Dream's has a capital letter
    if family is None:
        known = f"known families are {', '.join(_BY_TYPE)}"
        raise ValueError(f"{path}: {shown('model_type', kind)}; {known}")
    try:
        model = family.settings(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_ids(model, config, path)
    generation = path.with_name(GENERATION)
    if generation.exists():
        check_ids(model, read_object(generation), generation)
    return model


def weight_mappings(model: ModelSettings) -> list[WeightMapping]:
    """Return one mapping for each Megatron parameter of the whole model."""
    return expand(FAMILIES[model.family].mappings(model), model.num_layers)


def hf_shapes(model: ModelSettings) -> Shapes:
    """Return the shape of every Hugging Face tensor, by name."""
    return part_shapes(weight_mappings(model), model)
