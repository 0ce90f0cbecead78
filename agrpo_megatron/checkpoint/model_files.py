"""The files of a checkpoint besides its tensors: settings, tokenizer, generation files.

model.yaml  settings of the model
run.yaml    settings of the run, if it was trained
hf/         every file of the Hugging Face directory except weights: config.json, tokenizer, chat
            template, modelling code, index; without such a directory: the tokenizer
"""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agrpo_megatron.checkpoint.exports import own_files as exports
from agrpo_megatron.config.rules.model import AUTOREGRESSIVE
from agrpo_megatron.config.schema import load, to_yaml
from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import FAMILIES, settings_from_hf
from agrpo_megatron.families.config_json import CONFIG, GENERATION, OWN_TYPE, check_ids, read_object
from agrpo_megatron.families.files import PICKLED
from agrpo_megatron.runs.progress import HF, MODEL_FILE

WEIGHTS = (".safetensors", ".h5", ".msgpack", ".gguf", *PICKLED)
TOKENIZER = "tokenizer.model"
EVERY = re.compile(".*")
# Files of a tokenizer in a Hugging Face directory.
OF_TOKENIZER = re.compile(
    r"(tokeniz|special_tokens_map|added_tokens|vocab|merges|chat_template).*|.*\.(tiktoken|model)"
)
DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json; the newer name first


def write_model_files(folder: Path, model: ModelSettings, sources: Iterable[Path]) -> None:
    """Write `model.yaml` and `hf/`; one rank.

    Args:
        sources: Hugging Face directories and sentencepiece files. The first one is the model's;
            each later one replaces the whole tokenizer, and nothing else.
    """
    target = folder / HF
    target.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_text(to_yaml(replace(model, load=None)), encoding="utf-8")
    for number, source in enumerate(sources):
        for path in target.iterdir():
            if OF_TOKENIZER.fullmatch(path.name):
                path.unlink()
        if source.is_dir():
            carry(source, target, names=OF_TOKENIZER if number else EVERY)
        else:
            shutil.copyfile(source, target / TOKENIZER)


def read_model(folder: Path) -> ModelSettings:
    """Read the settings of a checkpoint's model.

    Raises:
        ValueError: the checkpoint has none; another tool wrote it.
    """
    if not (folder / MODEL_FILE).exists():
        raise ValueError(
            f"{folder}: no {MODEL_FILE}; write it with the settings under `model` "
            "(`agrpo config --section model.` explains them)"
        )
    return load(ModelSettings, folder / MODEL_FILE)


def carry(source: Path, target: Path, *, names: re.Pattern[str] = EVERY) -> None:
    """Copy the files of a directory with these names, except weights and hidden files."""
    for path in sorted(source.iterdir()):
        is_carried = path.is_file() and path.suffix not in WEIGHTS and names.fullmatch(path.name)
        if is_carried and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)


def write_config(folder: Path, config: dict[str, Any], model: ModelSettings) -> None:
    """Write config.json as transformers does; remove a generation_config.json of another model."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    generation = folder / GENERATION
    try:
        check_ids(model, read_object(generation), generation)
    except ValueError:
        generation.unlink(missing_ok=True)


def config_of(
    model: ModelSettings, dtype: str, folder: Path, *, own_code: bool = False
) -> tuple[dict[str, Any], bool]:
    """Return config.json for a model, and whether our modelling file loads it.

    The first value is empty if the folder's config.json describes the model. That file may belong
    to the model of the tokenizer, or be older than a changed setting. A model without the file was
    trained from nothing: it gets our modelling file, if that supports the family.

    Args:
        own_code: use our modelling file even if the folder has its own.

    Raises:
        ValueError: the modelling code does not support this model.
    """
    try:
        described, carried = settings_from_hf(folder), read_object(folder / CONFIG)
    except ValueError:
        described, carried = None, {}
    config = carried if described and described.family == model.family else {}
    is_own = own_code or config.get("model_type") == OWN_TYPE
    is_own |= not config and model.family in exports.FAMILIES
    is_own |= model.family in AUTOREGRESSIVE and model.attention != "causal"
    if described is None or architecture(described) != architecture(model):
        config = {**config, **FAMILIES[model.family].config(model)}
    if is_own:
        config = exports.own_config(config, model)
    keys = [key for key in DTYPE_KEYS if key in config] or [DTYPE_KEYS[0]]
    config = {**config, **dict.fromkeys(keys, dtype)}
    return {} if config == carried else config, is_own


def architecture(model: ModelSettings) -> dict[str, Any]:
    """Return the settings that two copies of a model share."""
    groups = model.num_query_groups or model.num_attention_heads
    values = {**asdict(model), "num_query_groups": groups, "head_dim": model.head_width}
    return {k: v for k, v in values.items() if k not in ("load", "init_std", "megatron")}
