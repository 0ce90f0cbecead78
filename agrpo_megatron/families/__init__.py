"""Model families: Hugging Face configuration and weight names, translated to ours and back.

A family is one file with `FAMILY`, a `Family` record. `FAMILIES` holds them by `model_type`.
"""

from agrpo_megatron.families.llada import FAMILY as LLADA
from agrpo_megatron.families.names import Family

FAMILIES: dict[str, Family] = {LLADA.name: LLADA}
