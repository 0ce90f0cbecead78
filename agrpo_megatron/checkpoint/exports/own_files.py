"""Make a Hugging Face directory loadable by transformers: modelling file, configuration, tokenizer.

For a model that has no modelling files: one that was trained here from nothing. The file is only
copied, never run here.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agrpo_megatron import families
from agrpo_megatron.config.rules.model import AUTOREGRESSIVE
from agrpo_megatron.config.settings import ModelSettings, TokenizerSettings
from agrpo_megatron.families.config_json import (
    GENERATION,
    HARMLESS,
    OWN_FAMILY,
    OWN_TYPE,
    read_object,
)
from agrpo_megatron.text.tokenizer import CHARACTERS, load_tokenizer

MODELLING = Path(__file__).parent / "modeling_agrpo.py"
FAMILIES = ("llada", "dream", "sdar", "sdar_moe", "llada_moe", "llada2_moe", *AUTOREGRESSIVE)
CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")
KEPT = HARMLESS | {"eos_token_id"}  # of which a file may have several
TOKENIZER_MODEL, TOKENIZER_CONFIG = "tokenizer.model", "tokenizer_config.json"


def own_config(config: Mapping[str, Any], model: ModelSettings) -> dict[str, Any]:
    """Return config.json with our classes, and all keys of the family, so that none has a default.

    The family's values replace those of `config`, which the family's own code may ignore or write
    in another form. Ids of tokens and other keys that change no logits stay.

    Raises:
        ValueError: the modelling file does not have the family.
    """
    if model.family not in FAMILIES:
        raise ValueError(
            f"model.family={model.family}: the modelling file of agrpo_megatron has "
            f"{', '.join(FAMILIES)}; put the family's own modelling files next to the weights"
        )
    # Published files leave some keys out. null means that a key is not set.
    every = {**config, **families.FAMILIES[model.family].config(model)}
    every |= {key: value for key, value in config.items() if key in KEPT and value is not None}
    every = {key: value for key, value in every.items() if value is not None}
    every.pop("attn_implementation", None)  # of attention that only the family's own code has
    return {
        **every,
        "tie_word_embeddings": False,
        "model_type": OWN_TYPE,
        OWN_FAMILY: model.family,
        "architectures": ["AgrpoModel"],
        "auto_map": {
            "AutoConfig": f"{MODELLING.stem}.AgrpoConfig",
            **dict.fromkeys(CLASSES, f"{MODELLING.stem}.AgrpoModel"),
        },
    }


def write_own_files(folder: Path, model: ModelSettings) -> None:
    """Write the modelling file, generation_config.json and what the tokenizer's files lack."""
    shutil.copyfile(MODELLING, folder / MODELLING.name)
    ids = {"eos_token_id": model.eos_token_id, "pad_token_id": model.eos_token_id}
    if not (folder / GENERATION).exists():
        _write(folder / GENERATION, {**ids, "mask_token_id": model.mask_token_id})
    tokenizer_model = folder / TOKENIZER_MODEL
    is_built_in = tokenizer_model.exists() and (
        tokenizer_model.read_bytes() == CHARACTERS.read_bytes()
    )
    if is_built_in:
        _write_characters(folder)
    elif (folder / TOKENIZER_CONFIG).exists():
        _name_mask_token(folder, model)


def _write_characters(folder: Path) -> None:
    """Write the built-in tokenizer, one token for each character, as transformers reads it."""
    own = load_tokenizer(TokenizerSettings())
    pieces = {number: own.to_piece(number) for number in range(own.vocab_size)}
    special = {number: pieces[number] for number in sorted(own.special)}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    unknown, end, mask = (
        pieces[n] for n in (own.unknown_id, own.eos_id, own.mask_id) if n is not None
    )
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": piece, "special": True, **added}
            for number, piece in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {piece: number for number, piece in pieces.items()},
            "unk_token": unknown,
        },
    }
    _write(folder / "tokenizer.json", tokenizer)
    names = {"unk_token": unknown, "eos_token": end, "pad_token": end, "mask_token": mask}
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write(folder / TOKENIZER_CONFIG, {**plain, **names})


def _name_mask_token(folder: Path, model: ModelSettings) -> None:
    """Register the mask token and padding in tokenizer_config.json, if they are not yet."""
    path = folder / TOKENIZER_CONFIG
    mask = model.mask_token_id
    given, own = read_object(path), load_tokenizer(TokenizerSettings(str(folder)), mask_id=mask)
    names = {"pad_token": own.to_piece(own.eos_id)}
    if mask is not None and mask < own.vocab_size:
        names["mask_token"] = own.to_piece(mask)
    lacking = {name: piece for name, piece in names.items() if given.get(name) is None}
    if lacking:
        _write(path, {**given, **lacking})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
