"""What a run takes from `model.load`, or from its own checkpoint: architecture and tokenizer."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agrpo_megatron.config.schema import changed, load, written
from agrpo_megatron.config.settings import ModelSettings, Settings, TokenizerSettings
from agrpo_megatron.config.values import text
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.families.config_json import CONFIG, index_bytes, read_index
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
from agrpo_megatron.scaling.forecast.disk import size

# Settings of `model` that may differ from those of `model.load`: weights of that shape take any.
REPLACE_LOADED = ("max_sequence_length", "mask_token_id", "eos_token_id", "rope_theta")
REPLACE_LOADED += ("norm_epsilon", "init_std", "block_length")
# Settings of `model` that a plan without its folder needs.
SHAPES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
MOST_NAMED = 8  # shards in one line


@dataclass(frozen=True)
class Missing:
    """What this machine lacks of `model.load`, and what a plan still has."""

    text: str  # one line
    has_folder: bool
    has_tokenizer: bool


def on_its_own(settings: Settings, checkpoint: Path) -> Settings:
    """Replace what a run started from, which may be gone, by its checkpoint's own files."""
    if not (checkpoint / MODEL_FILE).exists() or not (checkpoint / RUN_FILE).exists():
        return settings
    load_from = settings.model.load and str(checkpoint)
    lora = settings.lora
    if (checkpoint / BASE_FILE).exists():  # adapters alone: their base has to be there still
        load_from, lora = read_base(checkpoint).load, replace(lora, load=None)
    saved, given = load(Settings, checkpoint / RUN_FILE).tokenizer, settings.tokenizer
    if saved.path is not None and given.path in (None, saved.path):
        path = _carried_tokenizer(checkpoint, is_file=saved.path.endswith(".model"))
        given = replace(given, path=path or saved.path)
    template = checkpoint / HF / TEMPLATE
    is_own = given.chat_template in (None, saved.chat_template)
    if is_own and (saved.chat_template or "").endswith(".jinja") and template.exists():
        given = replace(given, chat_template=str(template))
    model = changed(settings.model, load=load_from)
    return replace(settings, model=model, tokenizer=given, lora=lora)


def missing_files(settings: Settings) -> Missing | None:
    """Return what a Hugging Face directory of `model.load` lacks; None if a run can start from it.

    A missing folder counts if the settings give the model's shapes.

    Raises:
        ValueError: the index of the weights cannot be read.
    """
    source = settings.model.load
    if source is None:
        return None
    folder, has_tokenizer = Path(source), settings.tokenizer.path is not None
    if not folder.exists() and set(SHAPES) <= written(settings.model):
        by = "the folder is missing; planned with the shapes of the settings file"
        return _missing(source, by, has_folder=False, has_tokenizer=has_tokenizer)
    is_ours = (folder / RUN_SETTINGS).exists() or (folder / MODEL_FILE).exists()
    if is_ours or not (folder / CONFIG).is_file():
        return None
    lacked = _missing_weights(folder)
    if not has_tokenizer:
        has_tokenizer = any((folder / name).exists() for name in VOCABULARIES)
        lacked += [] if has_tokenizer else VOCABULARIES[:1]
    if not lacked:
        return None
    by = f"the folder lacks {', '.join(lacked)}; planned with its {CONFIG}"
    return _missing(source, by, has_folder=True, has_tokenizer=has_tokenizer)


def _missing(source: str, by: str, *, has_folder: bool, has_tokenizer: bool) -> Missing:
    more = "" if has_tokenizer else ", prompts are not checked"
    return Missing(f"model.load={source}: {by}{more}", has_folder, has_tokenizer)


def _missing_weights(folder: Path) -> list[str]:
    """Return the weight files that a Hugging Face directory lacks, by its index if it has one."""
    index = read_index(folder)
    if index is None:
        return [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    files = set(index.values())
    lacked = [name for name in sorted(files) if not (folder / name).is_file()]
    more = len(lacked) - MOST_NAMED
    named = [*lacked[:MOST_NAMED], f"{more} more shards"] if more > 1 else lacked
    total = index_bytes(folder)
    if lacked and total is not None:
        there = sum((folder / name).stat().st_size for name in files.difference(lacked))
        named[-1] += f" (about {size(max(0, total - there))} of {size(total)})"
    return named


def with_loaded_model(settings: Settings, *, has_weights: bool = True) -> Settings:
    """Take the architecture from `model.load`, and its tokenizer if none is set.

    Args:
        has_weights: whether the weights of a Hugging Face directory, if any, must be whole.
    """
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
        if has_weights:
            _check_weights(source, model)
    if model.attention == "causal":
        model = _as_diffusion(model, settings, is_folder=not model_file.exists())
    model = _with_written(model, settings.model)
    tokenizer = settings.tokenizer
    if tokenizer.path is None:
        chat_template = tokenizer.chat_template or carried.chat_template
        tokenizer = replace(tokenizer, path=carried.path, chat_template=chat_template)
    return replace(settings, model=model, tokenizer=tokenizer)


def _as_diffusion(loaded: ModelSettings, settings: Settings, *, is_folder: bool) -> ModelSettings:
    """Return the diffusion model that a run makes of an autoregressive one.

    It attends to whole rows if no other attention is written. Then it predicts each token from the
    state before it, as it has learned, and a block model from the token's own place.

    Args:
        is_folder: whether the weights are a Hugging Face directory.

    Raises:
        ValueError: the weights cannot start a model with these tensors.
    """
    ours, names = settings.model, written(settings.model)
    attention = ours.attention if "attention" in names else "full"
    rows = loaded.vocab_size or 0
    if "vocab_size" in names and ours.vocab_size is not None:
        rows = max(rows, ours.vocab_size)
    is_tied = loaded.tie_embeddings and ("tie_embeddings" not in names or ours.tie_embeddings)
    changes = {
        f"model.vocab_size={rows} adds rows": rows != loaded.vocab_size,
        "model.tie_embeddings=false adds a head": is_tied != loaded.tie_embeddings,
    }
    for change, is_there in changes.items():
        if is_there and settings.lora.rank is not None:
            raise ValueError(
                f"{change}, and lora.rank={settings.lora.rank} keeps the tensors of "
                f"model.load={ours.load}; leave it out, or use lora.rank=null"
            )
        if is_there and not is_folder:
            raise ValueError(
                f"{change}, which only a Hugging Face directory can start; set model.load to one"
            )
    return replace(
        loaded,
        attention=attention,
        shift=ours.shift if "shift" in names else attention == "full",
        vocab_size=rows,
        tie_embeddings=is_tied,
    )


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
