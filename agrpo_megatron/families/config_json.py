"""The JSON files of a Hugging Face directory: strict reading, and keys and ids of every family."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.config.values import MOST_FLOAT

CONFIG, GENERATION = "config.json", "generation_config.json"
INDEX = "model.safetensors.index.json"
# The type of a model with our modelling file, and the key that says which family it is.
OWN_TYPE, OWN_FAMILY = "agrpo", "agrpo_family"
# Keys that transformers writes for any model, and that change no logits here.
_ANY_MODEL = f"""
{OWN_FAMILY}
_attn_implementation_autoset _name_or_path architectures auto_map bos_token_id do_sample dtype
id2label initializer_range label2id max_length model_type output_attentions output_hidden_states
pad_token_id problem_type repetition_penalty return_dict temperature tokenizer_class top_k top_p
torch_dtype torchscript transformers_version unsloth_fixed unsloth_version use_cache
"""
HARMLESS = frozenset(_ANY_MODEL.split())
# Keys of the same kind that ask for another computation.
OFF = ("add_cross_attention", "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: it is missing, damaged, something else, or has a key twice.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
        if isinstance(found, dict):
            return found
        raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        fix = "download it again, or give a Hugging Face directory"
        raise ValueError(f"{path}: not a JSON object ({error}); {fix}") from None


def read_index(directory: Path) -> dict[str, str] | None:
    """Return the file of each tensor from the directory's index; None without an index.

    Raises:
        ValueError: the index cannot be read, or names a file that is not in its folder.
    """
    path = directory / INDEX
    if not path.exists():
        return None
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{path}: not an index of safetensors: it has no weight_map")
    for name, file in files.items():
        # A conversion back writes these names. Links may lead anywhere, as in the hub's cache.
        parts = Path(file).parts if isinstance(file, str) else ("..",)
        if ".." in parts or Path(file).is_absolute() or not file.endswith(".safetensors"):
            fix = "name a .safetensors file in this folder or below it"
            raise ValueError(f"{path}: {shown('weight_map', {name: file})}; {fix}")
    return files


def index_bytes(directory: Path) -> int | None:
    """Return the bytes of all tensors by the directory's index; None where it does not count them.

    Raises:
        ValueError: the index is missing or cannot be read.
    """
    counts = read_object(directory / INDEX).get("metadata")
    total = counts.get("total_size") if isinstance(counts, dict) else None
    return int(total) if isinstance(total, int | float) and 0 < total <= MOST_FLOAT else None


def end_ids(given: Mapping[str, Any]) -> list[Any]:
    """Return `eos_token_id` of a file, which may be one id or a list of them, as a list."""
    found = given.get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def check_ids(model: ModelSettings, given: Mapping[str, Any], source: Path) -> None:
    """Check that a file's token ids are rows of the embedding, and its mask token the model's.

    Raises:
        ValueError: the first id that is not, or a mask token that ends a text.
    """
    rows, mask, ends = model.vocab_size, given.get("mask_token_id"), end_ids(given)
    assert rows is not None
    mask = model.mask_token_id if mask is None else mask
    counted = {"vocab_size": rows, **given}["vocab_size"]
    tokens = [("eos_token_id", end) for end in ends]
    tokens += [("mask_token_id", mask)] * (mask is not None)  # None: the tokenizer's
    for key, value in [("vocab_size", counted), *tokens]:
        if type(value) is not int or not 0 <= value < rows + (key == "vocab_size"):
            by = f"does not fit the embedding of {rows} rows; correct one of them"
            raise ValueError(f"{source}: {shown(key, value)} {by}")
    if mask is not None and (mask != model.mask_token_id or mask in ends):
        other = "eos_token_id too" if mask in ends else f"{model.mask_token_id} in {CONFIG}"
        raise ValueError(f"{source}: mask_token_id={mask} is {other}; correct one of them")


def check_number(said: str, value: object) -> None:
    """Check a value that is calculated with.

    Raises:
        ValueError: it is no number, negative or out of range; `said` names key and value.
    """
    if type(value) not in (int, float) or not 0 <= value <= MOST_FLOAT:  # type: ignore[operator]
        raise ValueError(f"{said} must be a number from 0 to {MOST_FLOAT}")


def shown(key: str, value: Any) -> str:
    """Return `key=value` for an error: one line, and not a long one."""
    return f"{ascii(key)[1:-1]:.80}={value!r:.80}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r:.80} is written twice")
    return dict(pairs)
