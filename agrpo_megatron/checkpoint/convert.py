"""Hugging Face to Megatron and back, as a stream: memory does not grow with the model.

The output gets its name when it is complete. An interrupted conversion leaves `.NAME.partial` in
the same folder; the same conversion started again resumes from it.
"""

import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agrpo_megatron.checkpoint.card import loader_of, write_card
from agrpo_megatron.checkpoint.exports.own_files import write_own_files
from agrpo_megatron.checkpoint.integrity import seal, verify
from agrpo_megatron.checkpoint.lora.merged import AdapterTensors
from agrpo_megatron.checkpoint.model_files import (
    OF_TOKENIZER,
    carry,
    config_of,
    write_config,
    write_model_files,
)
from agrpo_megatron.checkpoint.torch_dist import BLOCK, Piece, checkpoint_place, write_checkpoint
from agrpo_megatron.checkpoint.weights import DTYPES, is_megatron, open_checkpoint, open_weights
from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import hf_shapes, weight_mappings
from agrpo_megatron.families.config_json import CONFIG, read_object
from agrpo_megatron.families.files import (
    INDEX,
    SINGLE,
    HfWeights,
    Stored,
    merged_name,
    read_index,
    write_safetensors,
)
from agrpo_megatron.families.llada2_moe import MERGED_TYPE
from agrpo_megatron.families.peft import TENSORS, write_peft
from agrpo_megatron.families.tensors import megatron_shape
from agrpo_megatron.families.transforms import Part, Split, to_megatron
from agrpo_megatron.runs.base import read_base
from agrpo_megatron.runs.files import write_whole
from agrpo_megatron.runs.progress import BASE_FILE, HF

SHARD = 5_000_000_000  # bytes of a Hugging Face shard without an index
JOB = "conversion.json"

ByteProgress = Callable[[int, int], Any]  # called with the bytes done, and the bytes in all


def to_megatron_checkpoint(
    source: Path, target: Path, *, progress: ByteProgress, dtype: str | None = None
) -> None:
    """Convert a Hugging Face directory to a Megatron checkpoint; one process.

    Args:
        dtype: `fp32`, `bf16` or `fp16`; None keeps each tensor's own.

    Raises:
        ValueError: the source is incomplete or of an unknown family, or the target exists.
    """
    model, weights = open_weights(source)
    assert isinstance(weights, HfWeights)
    pieces = _pieces(model, weights, dtype)
    with _unfinished(target, source, dtype) as partial:
        write_checkpoint(partial, pieces, _Count(sum(p.nbytes for p in pieces), progress).add)
        write_model_files(partial, model, [source])


def to_hf_directory(
    source: Path,
    target: Path,
    *,
    progress: ByteProgress,
    dtype: str | None = None,
    base: Path | None = None,
    own_code: bool = False,
) -> str:
    """Convert a Megatron checkpoint, of any layout, to a Hugging Face directory; one process.

    The original modelling code can load the names, shapes, dtypes and shards. Adapters are merged.
    Returns one line: what loads the directory.

    Args:
        dtype: `fp32`, `bf16` or `fp16`; None keeps each tensor's own.
        base: where the base of adapters is now; None: where it was.
        own_code: write our modelling file, also in place of the model's own.

    Raises:
        ValueError: the source is damaged or lacks a tensor, the target exists, or our modelling
            file does not have the family.
    """
    weights = open_checkpoint(source, dtype=dtype, base=base)
    tensors, parts = _published_form(weights.tensors, source / HF)
    files = _shards(tensors, source / HF)
    kinds = Counter(tensor.dtype for tensor in tensors.values())
    common = str(kinds.most_common(1)[0][0]).removeprefix("torch.")
    config, is_own = config_of(weights.model, common, source / HF, own_code=own_code)
    count = _Count(sum(tensor.nbytes for tensor in tensors.values()), progress)
    with _unfinished(target, source, dtype) as partial:
        for file in sorted(set(files.values())):
            held = {name: tensor for name, tensor in tensors.items() if files[name] == file}
            if (partial / file).exists():
                count.add(sum(tensor.nbytes for tensor in held.values()))
                continue
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(
                partial / file,
                held,
                lambda name: count.passing(b for part in parts[name] for b in weights.blocks(part)),
            )
        carry(source / HF, partial)
        if config:
            write_config(partial, config, weights.model)
        if is_own:
            write_own_files(partial, weights.model)
        _write_index(partial, files, tensors)
        write_card(source, partial)
    return loader_of(target)


def to_peft_directory(
    source: Path, target: Path, *, progress: ByteProgress, dtype: str | None = None
) -> None:
    """Convert a checkpoint of adapters to a directory that the PEFT library loads; one process.

    Raises:
        ValueError: the source is damaged, or holds all weights, or the target exists.
    """
    verify(source)
    if not (source / BASE_FILE).exists():
        raise ValueError(
            f"{source}: holds all weights of a model, and no adapters; use `agrpo convert to-hf`"
        )
    tensors = AdapterTensors(source)
    kind = DTYPES[dtype] if dtype else tensors.dtype
    with _unfinished(target, source, dtype) as partial:
        write_peft(
            partial,
            tensors.part,
            model=tensors.model,
            lora=tensors.lora,
            base=read_base(source).load,
            dtype=kind,
        )
        carry(source / HF, partial, names=OF_TOKENIZER)
    size = (target / TENSORS).stat().st_size
    progress(size, size)


def _pieces(model: ModelSettings, weights: HfWeights, dtype: str | None) -> list[Piece]:
    """Return the pieces of a checkpoint: blocks of rows, or whole tensors if they are joined."""
    shapes, pieces, kinds = hf_shapes(model), [], {} if dtype else _dtypes(model, weights)
    for mapping in weight_mappings(model):
        parts = [weights.part(name) for name in mapping.parts]
        shape = megatron_shape(mapping, shapes)
        count, width = shape[0], shape[1:]
        place = checkpoint_place(mapping.megatron, model)
        kind = DTYPES[dtype] if dtype else kinds[place.key]
        block = max(1, BLOCK // (torch.Size(width).numel() * kind.itemsize))
        step = count if len(parts) > 1 else block
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            offset = (*place.index, start, *(0 for _ in width))
            own = (*(1 for _ in place.index), rows.stop - start, *width)
            make = functools.partial(_rows, parts, mapping.transform, model, rows, kind)
            pieces.append(Piece(place.key, kind, (*place.counts, *shape), offset, own, make))
    return pieces


def _dtypes(model: ModelSettings, weights: HfWeights) -> dict[str, torch.dtype]:
    """Return the dtype of each checkpoint tensor, which its parts in all layers have to share."""
    found: dict[str, tuple[torch.dtype, str]] = {}  # and its first part
    for mapping in weight_mappings(model):
        for name in mapping.parts:
            kind = weights.tensors[name].dtype
            key = checkpoint_place(mapping.megatron, model).key
            first, other = found.setdefault(key, (kind, name))
            if kind != first:
                both = f"{other} ({first}) and {name} ({kind}) become one tensor"
                raise ValueError(f"{weights.directory}: {both}; choose one dtype by --dtype")
    return {key: kind for key, (kind, _) in found.items()}


def _rows(
    parts: Sequence[Part], transform: str, model: ModelSettings, rows: slice, dtype: torch.dtype
) -> Tensor:
    part = parts[0] if len(parts) == 1 else to_megatron(parts, transform, model, Split())
    return part[rows].to(dtype)


def _published_form(
    tensors: Mapping[str, Stored], carried: Path
) -> tuple[dict[str, Stored], dict[str, list[str]]]:
    """Return the tensors of a Hugging Face directory, and the tensors of the model in each.

    Experts are merged where the index or the type of the carried configuration says so.
    """
    names = set(read_index(carried) or ())
    try:
        is_merged = read_object(carried / CONFIG).get("model_type") == MERGED_TYPE
    except ValueError:  # it is missing, or damaged, and `config_of` writes another
        is_merged = False
    result, parts = dict[str, Stored](), dict[str, list[str]]()
    for own, stored in tensors.items():
        merged, name = merged_name(own), own
        if merged is not None and (is_merged or merged[0] in names):
            name = merged[0]
        held = parts.setdefault(name, [])
        held.append(own)
        result[name] = stored if name == own else replace(stored, shape=(len(held), *stored.shape))
    return result, parts


def _shards(tensors: Mapping[str, Stored], carried: Path) -> dict[str, str]:
    """Return the file of each tensor: from the carried index, or filled in order."""
    index = read_index(carried)
    if index is not None and set(tensors) <= set(index):  # it may have left-out buffers too
        return {name: index[name] for name in tensors}
    number, filled, numbers = 0, 0, {}
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > SHARD:
            number, filled = number + 1, 0
        filled += tensor.nbytes
        numbers[name] = number
    if number == 0:
        return dict.fromkeys(tensors, SINGLE)
    ending = f"-of-{number + 1:05d}.safetensors"
    return {name: f"model-{n + 1:05d}{ending}" for name, n in numbers.items()}


def _write_index(folder: Path, files: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    """Write the index of several shards, unless the carried one is right."""
    size, path = sum(tensor.nbytes for tensor in tensors.values()), folder / INDEX
    if path.exists():
        carried = read_object(path)
        said = carried.get("metadata")
        has_size = not isinstance(said, dict) or said.get("total_size", size) == size
        if has_size and carried.get("weight_map") == files:
            return
    elif set(files.values()) == {SINGLE}:
        return
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Count:
    """Counts bytes and reports them with the total."""

    def __init__(self, total: int, progress: ByteProgress):
        self._done, self._total, self._progress = 0, total, progress

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._done, self._total)

    def passing(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield blocks; count each when the next is requested."""
        for block in blocks:
            yield block
            self.add(block.nbytes)


@contextmanager
def _unfinished(target: Path, source: Path, dtype: str | None) -> Iterator[Path]:
    """Yield the folder to write to, which becomes the target at the end.

    Files of an earlier attempt of this conversion stay, those of another are removed.
    """
    if target.exists():
        raise ValueError(f"{target} exists; choose another name, or remove it")
    partial = target.with_name(f".{target.name}.partial")
    state = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(source.iterdir())]
    job = json.dumps({"source": str(source.resolve()), "dtype": dtype, "files": state})
    record = partial / JOB
    if not record.exists() or record.read_text(encoding="utf-8") != job:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_whole(record, job)
    yield partial
    record.unlink()
    if is_megatron(partial):
        seal(partial)
    partial.rename(target)
