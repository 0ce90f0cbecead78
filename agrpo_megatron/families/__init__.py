"""Model families: Hugging Face configuration and weight names, translated to ours and back.

A family is one file with `FAMILY`, a `Family` record. `FAMILIES` holds them by `model_type`.
"""

import json
from pathlib import Path

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.dream import FAMILY as DREAM
from agrpo_megatron.families.llada import FAMILY as LLADA
from agrpo_megatron.families.names import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA, DREAM)}


def settings_from_hf(directory: str | Path) -> ModelSettings:
    """Read the model settings of a Hugging Face directory.

    Raises:
        ValueError: config.json is missing, or of a family that is not known.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        fix = "give a Hugging Face directory"
        raise ValueError(f"{path}: cannot be read ({error}); {fix}") from None
    family = FAMILIES.get(str(kind).lower())  # Dream writes itself with a capital
    if family is None:
        raise ValueError(f"{path}: model_type={kind!r}; known families are {', '.join(FAMILIES)}")
    return family.settings(config)
