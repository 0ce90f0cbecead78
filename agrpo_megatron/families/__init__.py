"""Model families: conversion of Hugging Face configurations and weight names to ours and back.

A family is one file with `FAMILY`, a `Family` record. `FAMILIES` has them by name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.config_json import (
    CONFIG,
    GENERATION,
    OWN_FAMILY,
    OWN_TYPE,
    check_ids,
    read_object,
    shown,
)
from agrpo_megatron.families.dream import FAMILY as DREAM
from agrpo_megatron.families.llada import FAMILY as LLADA
from agrpo_megatron.families.llada2_moe import FAMILY as LLADA2_MOE
from agrpo_megatron.families.llada2_moe import MERGED_TYPE
from agrpo_megatron.families.llada_moe import FAMILY as LLADA_MOE
from agrpo_megatron.families.nemotron_diffusion import FAMILY as NEMOTRON
from agrpo_megatron.families.sdar import FAMILY as SDAR
from agrpo_megatron.families.sdar import FAMILY_MOE as SDAR_MOE
from agrpo_megatron.families.starts.autoregressive import LLAMA, QWEN2, QWEN3
from agrpo_megatron.families.tensors import Family, Shapes, WeightMapping, expand, part_shapes

_ALL = (LLADA, DREAM, SDAR, NEMOTRON, SDAR_MOE, LLADA_MOE, LLADA2_MOE, LLAMA, QWEN2, QWEN3)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
_BY_TYPE = {family.model_type or family.name: family for family in FAMILIES.values()}
_BY_TYPE[MERGED_TYPE] = LLADA2_MOE


def settings_from_hf(
    directory: str | Path, lacking: Mapping[str, Any] | None = None
) -> ModelSettings:
    """Read the model settings of a Hugging Face directory; the weights stay closed.

    Args:
        lacking: keys that a config.json without them has.

    Raises:
        ValueError: config.json is missing, of an unknown family, has a key that the family lacks,
            or disagrees with generation_config.json.
    """
    path = Path(directory) / CONFIG
    config = {**(lacking or {}), **read_object(path)}
    family = _family_of(config)
    if family is None:
        known = f"known families are {', '.join(_BY_TYPE)}"
        key = OWN_FAMILY if config.get("model_type") == OWN_TYPE else "model_type"
        known = known if key == "model_type" else f"known families are {', '.join(FAMILIES)}"
        raise ValueError(f"{path}: {shown(key, config.get(key))}; {known}")
    try:
        model = family.settings(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_ids(model, config, path)
    generation = path.with_name(GENERATION)
    if generation.exists():
        check_ids(model, read_object(generation), generation)
    return model


def _family_of(config: Mapping[str, Any]) -> Family | None:
    kind = str(config.get("model_type")).lower()  # Dream's has a capital letter
    if kind == OWN_TYPE:
        return FAMILIES.get(str(config.get(OWN_FAMILY)))
    if kind == LLADA.name and "num_experts" in config and "d_model" not in config:
        return LLADA_MOE  # published with the type of LLaDA-8B
    return _BY_TYPE.get(kind)


def weight_mappings(model: ModelSettings) -> list[WeightMapping]:
    """Return one mapping for each Megatron parameter of the whole model."""
    return expand(FAMILIES[model.family].mappings(model), model)


def hf_shapes(model: ModelSettings) -> Shapes:
    """Return the shape of every Hugging Face tensor, by name."""
    return part_shapes(weight_mappings(model), model)
