"""What a run takes from `model.load`, or from its own checkpoint: architecture and tokenizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from agrpo_megatron.config.schema import load, written
from agrpo_megatron.config.settings import ModelSettings, Settings, TokenizerSettings
from agrpo_megatron.config.values import text
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.runs.base import read_base
from agrpo_megatron.runs.progress import (
    BASE_FILE,
    CHECKPOINTS,
    HF,
    MODEL_FILE,
    RUN_FILE,
    RUN_SETTINGS,
    TEMPLATE,
    latest_checkpoint,
)

# Settings of `model` that may differ from those of `model.load`: weights of that shape take any.
REPLACE_LOADED = ("max_sequence_length", "mask_token_id", "eos_token_id", "rope_theta")
REPLACE_LOADED += ("norm_epsilon", "init_std", "block_length")


def on_its_own(settings: Settings, checkpoint: Path) -> Settings:
    """Replace what a run started from, which may be gone, by its checkpoint's own files."""
    if not (checkpoint / MODEL_FILE).exists() or not (checkpoint / RUN_FILE).exists():
        return settings
    load_from = settings.model.load and str(checkpoint)
    if (checkpoint / BASE_FILE).exists():  # adapters alone: their base has to be there still
        load_from = read_base(checkpoint).load
    saved, given = load(Settings, checkpoint / RUN_FILE).tokenizer, settings.tokenizer
    if saved.path is not None and given.path in (None, saved.path):
        path = _carried_tokenizer(checkpoint, is_file=saved.path.endswith(".model"))
        given = replace(given, path=path or saved.path)
    template = checkpoint / HF / TEMPLATE
    is_own = given.chat_template in (None, saved.chat_template)
    if is_own and (saved.chat_template or "").endswith(".jinja") and template.exists():
        given = replace(given, chat_template=str(template))
    return replace(settings, model=replace(settings.model, load=load_from), tokenizer=given)


def with_loaded_model(settings: Settings) -> Settings:
    """Take the architecture from `model.load`, and its tokenizer if none is set."""
    source = settings.model.load
    if source is None:
        return settings
    run_file, model_file = Path(source) / RUN_SETTINGS, Path(source) / MODEL_FILE
    if run_file.exists():
        saved, found = load(Settings, run_file), latest_checkpoint(Path(source) / CHECKPOINTS)
        model = saved.model
        carried = (on_its_own(saved, found[0]) if found else saved).tokenizer
    elif model_file.exists():
        model = load(ModelSettings, model_file)
        carried = TokenizerSettings(_carried_tokenizer(Path(source)))
    else:
        model, carried = settings_from_hf(source), TokenizerSettings(source)
        _check_weights(source, model)
    model = _with_written(model, settings.model)
    tokenizer = settings.tokenizer
    if tokenizer.path is None:
        chat_template = tokenizer.chat_template or carried.chat_template
        tokenizer = replace(tokenizer, path=carried.path, chat_template=chat_template)
    return replace(settings, model=model, tokenizer=tokenizer)


def _check_weights(source: str, model: ModelSettings) -> None:
    """Check that a Hugging Face directory has the model's tensors, if it has any weights."""
    if any(Path(source).rglob("*.safetensors")):
        from agrpo_megatron.families.files import HfWeights  # loads torch

        HfWeights(source, model)


def _with_written(loaded: ModelSettings, ours: ModelSettings) -> ModelSettings:
    """Return the model of `model.load` with the settings that were written besides; null is none.

    Raises:
        ValueError: a written setting contradicts the weights.
    """
    changes: dict[str, Any] = {"load": ours.load, "megatron": loaded.megatron | ours.megatron}
    for name in sorted(written(ours) - changes.keys()):
        value, there = getattr(ours, name), getattr(loaded, name)
        if value is None:
            continue
        if name == "num_query_groups":
            there = there or loaded.num_attention_heads
        if name == "head_dim":
            there = loaded.head_width
        if name not in REPLACE_LOADED and there not in (None, value):
            raise ValueError(
                f"model.{name}={text(value)} contradicts model.load={ours.load}, where it is "
                f"{text(there)}; leave it out, or write model.{name}={text(there)}"
            )
        changes[name] = value
    return replace(loaded, **changes)


def _carried_tokenizer(checkpoint: Path, *, is_file: bool = False) -> str | None:
    """Return the checkpoint's own tokenizer, if it has one: a directory, or a file."""
    folder = checkpoint / HF
    if not is_file and any(folder.glob("tokenizer*.json")):
        return str(folder)
    file = folder / "tokenizer.model"
    return str(file) if file.exists() else None
