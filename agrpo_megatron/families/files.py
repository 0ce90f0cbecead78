"""The weights of a Hugging Face directory: lazy reads of slices, streamed writes.

Source: the safetensors format (an 8-byte length, a JSON header, the bytes of the tensors).
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import hf_shapes
from agrpo_megatron.families.config_json import INDEX, read_index

SINGLE = "model.safetensors"
BUFFER = "rotary_emb.inv_freq"  # ends such names in old checkpoints; made from rope_theta here
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# One expert's tensor; a merged tensor holds those of all experts of a layer, [experts, ...].
EXPERT = re.compile(r"(.+\.mlp\.experts\.)(\d+)\.(\w+)\.weight")
MAX_MAPPED = 1 << 26  # bytes to read through one mapping of a file: mapped pages count as memory


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the tensor's size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def merged_name(name: str) -> tuple[str, int] | None:
    """Return the merged tensor that may hold an expert's tensor, and the expert's number."""
    found = EXPERT.fullmatch(name)
    return (f"{found[1]}{found[3]}", int(found[2])) if found else None


class LazyTensors:
    """Tensors in safetensors files, by name; indexing a tensor reads only that part."""

    def __init__(self, tensors: dict[str, Stored]):
        self.tensors, self.merged = tensors, set[str]()
        self._open: Any = None
        self._path, self._read = Path(), 0

    def part(self, name: str) -> "_FilePart":
        """Return a lazy tensor."""
        return _FilePart(self, name)

    def read(self, name: str, index: Any) -> Tensor:
        """Read a part of a tensor; a copy, so that the file's pages can be released."""
        stored, merged = self.tensors[name], merged_name(name)
        if merged is not None and merged[0] in self.merged:
            name, number = merged
            index = (number, *(index if isinstance(index, tuple) else (index,)))
        if stored.file != self._path or self._read > MAX_MAPPED:
            self._open = None
            self._open = safe_open(stored.file, framework="pt")
            self._path, self._read = stored.file, 0
        part = self._open.get_slice(name)[index].clone()
        self._read += part.nbytes
        return part


class HfWeights(LazyTensors):
    """The tensors of a Hugging Face directory.

    Raises:
        ValueError: there are no safetensors, a shard is missing, damaged or truncated, the index
            names another place of a tensor, or they are not the model's tensors.
    """

    def __init__(self, directory: str | Path, model: ModelSettings):
        super().__init__({})
        self.directory = Path(directory)
        index = read_index(self.directory)
        for file in _files(self.directory, index):
            for name, entry in read_header(file).items():
                if name.endswith(BUFFER):
                    continue
                if name in self.tensors:
                    raise ValueError(f"{file}: tensor {name} is also in {self.tensors[name].file}")
                self.tensors[name] = Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, file in (index or {}).items():
            found = self.tensors.get(name)
            if not name.endswith(BUFFER) and (found is None or found.file != self.directory / file):
                raise ValueError(f"{self.directory / INDEX}: tensor {name} is not in {file}")
        experts = model.moe.experts or 0
        self._split_merged(experts)
        if experts > len(self.tensors):
            raise ValueError(
                f"{self.directory}: config.json asks for {experts} experts of a layer, and there "
                f"are {len(self.tensors)} tensors; do they belong together?"
            )
        # If there are more layers than tensors, one is missing in the first of them.
        layers = min(model.num_layers, len(self.tensors) + 1)
        self._check(hf_shapes(replace(model, num_layers=layers)), model.family)

    def _split_merged(self, experts: int) -> None:
        """Put the tensors of single experts in place of those that hold all of a layer."""
        for name in [name for name in self.tensors if name.rpartition(".")[0].endswith(".experts")]:
            stored = self.tensors[name]
            if stored.shape[:1] != (experts,):
                raise ValueError(
                    f"{stored.file}: tensor {name} has shape {list(stored.shape)}, and config.json "
                    f"asks for {experts} experts"
                )
            prefix, _, part = name.rpartition(".")
            one = replace(stored, shape=stored.shape[1:])
            self.tensors |= {f"{prefix}.{e}.{part}.weight": one for e in range(experts)}
            del self.tensors[name]
            self.merged.add(name)

    def _check(self, shapes: Mapping[str, tuple[int, ...]], family: str) -> None:
        """Check that the directory has exactly the tensors of a model."""
        for name, shape in shapes.items():
            if name not in self.tensors:
                fix = f"the {family} family needs it; does config.json belong to them?"
                raise ValueError(f"{self.directory}: tensor {name} is missing; {fix}")
            found = self.tensors[name]
            if not found.dtype.is_floating_point:
                fix = "quantized weights are not read; save them as bfloat16 or float32"
                raise ValueError(f"{found.file}: tensor {name} has dtype {found.dtype}; {fix}")
            if found.shape != shape:
                raise ValueError(
                    f"{found.file}: tensor {name} has shape {list(found.shape)}, and config.json "
                    f"asks for {list(shape)}"
                )
        if extra := sorted(set(self.tensors) - set(shapes)):
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise ValueError(
                f"{self.tensors[extra[0]].file}: tensor {extra[0]}{more} would be lost: the "
                f"{family} family has no such tensor"
            )


@dataclass(frozen=True)
class _FilePart:
    """A tensor in a file, as `families.transforms.Part`."""

    weights: LazyTensors
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.tensors[self.name].shape

    def __getitem__(self, index: Any, /) -> Tensor:
        return self.weights.read(self.name, index)


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return the tensors of a safetensors file: dtype, shape and data_offsets of each.

    Raises:
        ValueError: the file is damaged or shorter than its header says; names the first
            truncated tensor.
    """
    damaged = OSError, struct.error, json.JSONDecodeError, UnicodeDecodeError, SafetensorError
    damaged += LookupError, TypeError, AttributeError, RecursionError
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = os.fstat(stream.fileno()).st_size
            header = json.loads(stream.read(length)) if length < size else None
        entries = {n: e for n, e in (header or {}).items() if n != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if 8 + length + entry["data_offsets"][1] > size:
                raise ValueError(f"{file} is cut short: tensor {name} is incomplete")
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{file}: tensor {name} has the unknown dtype {entry['dtype']}")
        with safe_open(file, framework="pt"):  # the library's own, stricter checks
            return entries
    except damaged as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def is_huggingface(path: Path) -> bool:
    """Return whether a directory is a Hugging Face model, with weights or without."""
    return (path / "config.json").is_file()


def _files(directory: Path, index: Mapping[str, str] | None) -> list[Path]:
    """Return the weight files of the index, or all without an index."""
    if index is not None:
        for name, file in index.items():
            if not os.path.isfile(directory / file):  # False for any text, unlike Path.is_file
                raise ValueError(f"{directory}: shard {file} is missing (tensor {name} is in it)")
        if SINGLE not in index.values() and (directory / SINGLE).exists():
            unlike = f"{SINGLE}, which other tools read in its place; remove one of the two"
            raise ValueError(f"{directory / INDEX} leaves out {unlike}")
        return sorted({directory / file for file in index.values()})
    if files := sorted(directory.glob("*.safetensors")):
        return files
    if pickled := sorted(p.name for p in directory.glob("*") if p.suffix in PICKLED):
        raise ValueError(
            f"{directory}: {pickled[0]} is a pickle, which can run code and is never opened; "
            "save the weights as .safetensors"
        )
    raise ValueError(f"{directory}: no .safetensors file; give a Hugging Face directory")


def write_safetensors(
    path: Path, tensors: Mapping[str, Stored], read: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write a safetensors file tensor by tensor; a complete file is renamed to `path`.

    The layout is that of the safetensors library: the widest dtypes first, then by name.

    Args:
        read: yields all rows of a tensor in blocks.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor, place = tensors[name], [offset, offset + tensors[name].nbytes]
        header[name] = {"dtype": CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": place}
        offset = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for block in read(name):
                assert block.dtype == tensors[name].dtype, name
                stream.write(block.contiguous().view(-1).view(torch.uint8).numpy())
        assert stream.tell() == 8 + len(text) + offset, path
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)
