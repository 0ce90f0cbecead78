"""Adapters in the format of the PEFT library: strict reading, and writing that it loads.

adapter_config.json         what the adapters are: rank, scale, layers
adapter_model.safetensors   their matrices, and the tensors that were trained whole

Source: `LoraConfig` and `get_peft_model_state_dict` of PEFT.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agrpo_megatron.config.schema import build
from agrpo_megatron.config.settings import LoraSettings, ModelSettings
from agrpo_megatron.config.values import text
from agrpo_megatron.families import hf_shapes, weight_mappings
from agrpo_megatron.families.config_json import read_object, shown
from agrpo_megatron.families.files import (
    DTYPES,
    LazyTensors,
    Stored,
    read_header,
    write_safetensors,
)
from agrpo_megatron.families.lora import (
    MATRICES,
    adapted_layers,
    linear_layers,
    tensor_name,
    trained_whole,
)
from agrpo_megatron.families.tensors import Shapes
from agrpo_megatron.families.transforms import Part

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # PEFT's two wrappers around the model
# Writers that save the model themselves leave the adapter's name in those of its tensors.
MATRIX = re.compile(r"(.+\.lora_[AB])(?:\.[^.]+)?(\.weight)")
SAVED = re.compile(r"(.+)\.modules_to_save(?:\.[^.]+)?(\.weight)")
SETTINGS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "rank_stabilised": "use_rslora",
    "dropout": "lora_dropout",
}
OMITTED = {"rank": 8, "alpha": 8, "rank_stabilised": False}  # what a missing key means to PEFT
WHOLE = ("train_embedding", "train_head")
# What adapters of this program are, also where the file lacks the key. It and `_config` have no key
# that is newer than PEFT 0.9: older versions refuse those that they do not know.
FIXED = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False}
# Keys that say where adapters came from, or which layers have some, as the tensors do too.
_HARMLESS = """
auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config
megatron_core modules_to_save peft_version qalora_group_size revision runtime_config target_modules
task_type
"""
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}  # of some layers, in place of these
START = "init_lora_weights"
KNOWN = {*SETTINGS.values(), *FIXED, *PATTERNS, START, *_HARMLESS.split()}
# Starts of the matrices that leave the base's weights as they are. The others take a part out of
# these: the adapters then belong to another base, which PEFT does not save.
STARTS = (True, False, "gaussian", "eva", "orthogonal")
OFF = (None, False, [], {})  # values of a key that asks for nothing


def read_peft(folder: Path, model: ModelSettings, lora: LoraSettings) -> Callable[[str], Part]:
    """Open adapters that PEFT or `write_peft` wrote; indexing a tensor reads only that part.

    Returns:
        What gives a whole tensor by its name within the model, for instance
        `model.layers.0.mlp.up_proj.lora_A.weight`, and those that are trained whole.

    Raises:
        ValueError: settings ask for other adapters than the folder has, or it is damaged.
    """
    _check_config(folder / CONFIG, lora)
    found = _stored(folder)
    shapes = _shapes(model, lora)
    for name, shape in shapes.items():
        if name not in found:
            raise ValueError(f"{folder}: {_missing(name, model, lora)}")
        stored = found[name][1]
        if not stored.dtype.is_floating_point:
            fix = "save it as float32 or bfloat16"
            raise ValueError(f"{folder}: tensor {name} has dtype {stored.dtype}; {fix}")
        if stored.shape != shape:
            raise ValueError(
                f"{folder}: tensor {name} has shape {list(stored.shape)}, and settings ask for "
                f"{list(shape)}; is it of another model?"
            )
    if extra := sorted(found.keys() - shapes.keys()):
        raise ValueError(f"{folder}: {_lost(extra, found.keys(), model, lora)}")
    lazy = LazyTensors(dict(found.values()))
    return lambda name: lazy.part(found[name][0])


def lora_settings_of(folder: Path, model: ModelSettings) -> LoraSettings:
    """Return the settings that ask for the adapters of a folder, and start from them.

    Raises:
        ValueError: no settings do.
    """
    path, names = folder / CONFIG, _stored(folder).keys()
    config = read_object(path)
    values = {ours: config[theirs] for ours, theirs in SETTINGS.items() if theirs in config}
    values |= {"modules": _modules(names, model), "load": str(folder)}
    for key in WHOLE:
        asked = trained_whole(model, replace(LoraSettings(), **{key: True}))
        values[key] = bool(asked) and set(asked.values()) <= names
    lora = build(LoraSettings, values, f"{path} as lora.")
    read_peft(folder, model, lora)
    return lora


def write_peft(
    folder: Path,
    read: Callable[[str], Part],
    *,
    model: ModelSettings,
    lora: LoraSettings,
    base: str | None,
    dtype: torch.dtype,
) -> None:
    """Write adapters that PEFT loads onto the published model; one rank. Equal input, equal bytes.

    Args:
        read: returns the tensors that `read_peft` does, whole.
        base: the published model, for `base_model_name_or_path`.
        dtype: of all tensors in the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TENSORS
    shapes = _shapes(model, lora)
    stored = {f"{PREFIX}{name}": Stored(path, dtype, shape) for name, shape in shapes.items()}

    def blocks(name: str) -> Iterator[Tensor]:
        yield read(name.removeprefix(PREFIX))[:].to(dtype).cpu()

    write_safetensors(path, stored, blocks)
    config = json.dumps(_config(model, lora, base), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")


def _config(model: ModelSettings, lora: LoraSettings, base: str | None) -> dict[str, Any]:
    """Return adapter_config.json; PEFT takes a layer's name, or the end of it from a dot on."""
    whole = [name.removesuffix(".weight") for name in trained_whole(model, lora).values()]
    chosen = [layer.name for layer in adapted_layers(model, lora)]
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        **FIXED,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": whole or None,
        "r": lora.rank,
        "revision": None,
        "target_modules": _short(chosen, model, _end),
        "task_type": None,
        "use_rslora": lora.rank_stabilised,
    }


def _check_config(path: Path, lora: LoraSettings) -> None:
    """Check that adapter_config.json describes adapters of these settings."""
    config = read_object(path)
    for setting in ("rank", "alpha", "rank_stabilised"):
        key, value = SETTINGS[setting], getattr(lora, setting)
        if (found := config.get(key, OMITTED[setting])) != value:
            fix = f"set lora.{setting}={json.dumps(found)}, or give other adapters"
            raise ValueError(
                f"{path}: {shown(key, found)} differs from lora.{setting}={text(value)}; {fix}"
            )
    for key, value in FIXED.items():
        if (found := config.get(key, value)) != value:
            fix = f"only {json.dumps(value)} is supported; train the adapters so"
            raise ValueError(f"{path}: {shown(key, found)}; {fix}")
    for key, same in PATTERNS.items():
        if (found := config.get(key)) not in OFF and set(found.values()) != {config.get(same)}:
            fix = f"each layer has to have the same {same}; train the adapters so"
            raise ValueError(f"{path}: {shown(key, found)}; {fix}")
    if (start := config.get(START, True)) not in STARTS:
        fix = "it changed the weights of the base; let PEFT convert the adapters to plain LoRA"
        raise ValueError(f"{path}: {shown(START, start)}; {fix}")
    for key in sorted(config.keys() - KNOWN):
        if config[key] not in OFF:
            fix = "it is not supported; remove it if logits are the same without it"
            raise ValueError(f"{path}: {shown(key, config[key])}; {fix}")


def _stored(folder: Path) -> dict[str, tuple[str, Stored]]:
    """Return the tensors of a folder by their names within the model, with those in the file."""
    path = folder / TENSORS
    if not path.is_file():
        fix = f"no {TENSORS}; give a folder that PEFT's save_pretrained wrote"
        if (folder / PICKLE).exists():
            fix = f"{PICKLE} is a pickle, which can run code and is never opened; save the "
            fix += "adapters as .safetensors"
        raise ValueError(f"{folder}: {fix}")
    found: dict[str, tuple[str, Stored]] = {}
    for key, entry in read_header(path).items():
        if not key.startswith(PREFIX):
            fix = f"PEFT's names start with {PREFIX}; save the adapters with its save_pretrained"
            raise ValueError(f"{path}: tensor {key}; {fix}")
        name = SAVED.sub(r"\1\2", MATRIX.sub(r"\1\2", key.removeprefix(PREFIX)))
        if name in found:
            fix = "two adapters in one file; save one of them"
            raise ValueError(f"{path}: tensor {key} is also {found[name][0]}: {fix}")
        found[name] = key, Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return found


def _shapes(model: ModelSettings, lora: LoraSettings) -> Shapes:
    """Return the shape of each tensor of the adapters that settings ask for."""
    assert lora.rank is not None
    shapes: Shapes = {}
    for layer in adapted_layers(model, lora):
        of = zip(MATRICES, ((lora.rank, layer.inputs), (layer.outputs, lora.rank)), strict=True)
        shapes |= {tensor_name(layer, matrix): shape for matrix, shape in of}
    every = hf_shapes(model)
    return shapes | {name: every[name] for name in trained_whole(model, lora).values()}


def _missing(name: str, model: ModelSettings, lora: LoraSettings) -> str:
    """Return why a tensor that settings ask for is missing, and the fix."""
    for key in WHOLE:
        if name in trained_whole(model, replace(lora, **{k: k == key for k in WHOLE})).values():
            return f"lora.{key}=true asks for tensor {name}, which is missing; use false"
    asked = f"lora.modules={text(lora.modules)} asks for tensor {name}, which is missing"
    return f"{asked}; name the layers that have adapters, or save all"


def _lost(
    extra: Sequence[str], names: Collection[str], model: ModelSettings, lora: LoraSettings
) -> str:
    """Return why some tensors of a folder would be lost, and the fix."""
    first, more = extra[0], f" and {len(extra) - 1} more" if len(extra) > 1 else ""
    for key in WHOLE:
        if first in trained_whole(model, replace(lora, **{key: True})).values():
            return f"lora.{key}=false would lose tensor {first}{more}; use true"
    if first.rpartition(".lora_")[0] in (layer.name for layer in linear_layers(model)):
        fix = f"use lora.modules={text(_modules(names, model))}"
        return f"lora.modules={text(lora.modules)} would lose tensor {first}{more}; {fix}"
    if f"{first.rpartition('.lora_')[0]}.weight" in _routers(model):
        return f"tensor {first}{more} is of a router, which gets no adapter; train without it"
    return f"tensor {first}{more} would be lost: the {model.family} family has no such tensor"


def _routers(model: ModelSettings) -> set[str]:
    """Return the names of the routers' weights."""
    return {m.parts[0] for m in weight_mappings(model) if m.megatron.endswith("router.weight")}


def _modules(names: Collection[str], model: ModelSettings) -> list[str] | None:
    """Return `lora.modules` for the layers that have a matrix among tensors of these names."""
    chosen = [each.name for each in linear_layers(model) if tensor_name(each, MATRICES[0]) in names]
    usual = [layer.name for layer in adapted_layers(model, LoraSettings(rank=1))]
    return None if chosen == usual else _short(chosen, model, _end, _of_every_block)


def _short(
    chosen: Sequence[str], model: ModelSettings, *shorter: Callable[[str], str]
) -> list[str]:
    """Return names of just these layers: by the first shorter form that names no other layer."""

    @cache
    def names_no_other(pattern: str) -> bool:
        named = adapted_layers(model, LoraSettings(rank=1, modules=[pattern]))
        return {layer.name for layer in named} <= set(chosen)

    forms = ((name, [short(name) for short in shorter]) for name in chosen)
    found = (next(filter(names_no_other, each), name) for name, each in forms)
    return list(dict.fromkeys(found))


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _of_every_block(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
