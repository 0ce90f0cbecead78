"""Megatron's `torch_dist` checkpoints as a stream: one tensor, or a block of its rows, at a time.

The format is torch.distributed.checkpoint's: files of tensors, and a `.metadata` that says which
block of which tensor lies where. A tensor of all layers is one tensor [layers, ...], under the
name that GPTModel gives it; of all experts too, [layers, experts, ...]. Where layers differ, the
name has the layer's number.
"""

import itertools
import json
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import default_planner, filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families.tensors import EXPERT, FUSED_NORMS, LAYER
from agrpo_megatron.runs.files import write_whole

METADATA, CONFIG = ".metadata", "metadata.json"
# Copied from Megatron, whose import takes seconds and half a gigabyte.
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
BLOCK = 1 << 26  # bytes held at a time of a tensor that can be cut into blocks of rows
FILE = 1 << 31  # bytes of tensors in a file
COMMON = "common_state/shard_0_1"  # where Megatron keeps non-tensors


@dataclass(frozen=True)
class Piece:
    """A block of rows of a checkpoint tensor, and the function that makes it."""

    key: str
    dtype: torch.dtype
    whole: tuple[int, ...]  # shape of the tensor
    offset: tuple[int, ...]  # where the block begins
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def index(self) -> MetadataIndex:
        """Return the block's key in a checkpoint."""
        return MetadataIndex(self.key, self.offset)

    @property
    def nbytes(self) -> int:
        """Return the block's bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Place(NamedTuple):
    """Where a parameter of the whole model lies in a checkpoint."""

    key: str  # name of the tensor
    index: tuple[int, ...] = ()  # the parameter's layer and expert in it
    counts: tuple[int, ...] = ()  # of layers and experts in it


def checkpoint_place(parameter: str, model: ModelSettings) -> Place:
    """Return the place of a parameter of the whole model.

    Source: `sharded_state_dict` of Megatron's TransformerBlock and SequentialMLP.
    """
    expert = EXPERT.match(parameter)
    if expert is not None:
        parameter = f"{expert[1]}experts.{expert[3]}"
    found = LAYER.match(parameter)
    if found is None:
        return Place(parameter)
    layer, name = int(found[1]), found[2]
    has_experts = layer >= model.num_layers - model.moe_layers
    if not (has_experts and name.startswith("pre_mlp_layernorm")):
        name = FUSED_NORMS.get(name, name)
    where = [] if model.moe.dense_layers else [(layer, model.num_layers)]
    prefix = f"{layer}." if model.moe.dense_layers else ""
    if expert is not None:
        assert model.moe.experts is not None
        where.append((int(expert[2]), model.moe.experts))
    index, counts = tuple(i for i, _ in where), tuple(n for _, n in where)
    return Place(f"decoder.layers.{prefix}{name}", index, counts)


def write_checkpoint(folder: Path, pieces: Sequence[Piece], done: Callable[[int], Any]) -> None:
    """Write pieces as a checkpoint that Megatron loads at any layout; one process.

    Resumes an interrupted call with the same pieces: finished files stay.

    Args:
        done: called with the number of bytes after each piece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = [planner.SavePlan([_item(piece) for piece in part]) for part in _files(pieces)]
    plans[0].items.append(WriteItem(MetadataIndex(COMMON), WriteItemType.BYTE_IO))
    plans, described = default_planner.create_default_global_save_plan(plans)
    writer = filesystem.FileSystemWriter(folder, thread_count=1)
    plans = writer.prepare_global_plan(plans)
    making = _Making(pieces, done)
    results = []
    for number, plan in enumerate(plans):
        record = folder / f"written-{number}.json"
        if record.exists():
            results.append(_decode(json.loads(record.read_text(encoding="utf-8"))))
            done(sum(making.pieces[i.index].nbytes for i in plan.items if i.tensor_data))
            continue
        results.append(writer.write_data(plan, making).value())
        write_whole(record, json.dumps(_encode(results[-1])))
    (folder / CONFIG).write_text(json.dumps(FORMAT), encoding="utf-8")
    writer.finish(described, results)
    # A killed `write_whole` leaves the hidden ones.
    for record in (*folder.glob("written-*"), *folder.glob(".written-*")):
        record.unlink()


class TorchDist:
    """A checkpoint opened for reading single tensors; one process.

    Raises:
        ValueError: not a checkpoint, or its metadata could run code.
    """

    def __init__(self, folder: Path):
        self.folder, self.metadata = folder, read_metadata(folder)
        self._reader = filesystem.FileSystemReader(folder)
        self._reader.set_up_storage_reader(self.metadata, True)
        self._by_index: dict[str, defaultdict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def tensors(self) -> list[str]:
        """Return the names of all tensors."""
        entries = self.metadata.state_dict_metadata.items()
        return [key for key, entry in entries if isinstance(entry, metadata.TensorStorageMetadata)]

    def tensor(self, key: str) -> metadata.TensorStorageMetadata:
        """Return the shape, dtype and saved blocks of a tensor.

        Raises:
            ValueError: the checkpoint has no such tensor.
        """
        found = self.metadata.state_dict_metadata.get(key)
        if not isinstance(found, metadata.TensorStorageMetadata):
            raise ValueError(f"{self.folder}: tensor {key} is missing from the checkpoint")
        return found

    def read(self, key: str, index: tuple[int, ...] = (), *, rows: slice | None = None) -> Tensor:
        """Return rows of a tensor, or of one layer and expert of it; all rows by default."""
        stored, lead = self.tensor(key), len(index)
        bounds = [slice(i, i + 1) for i in index] + [slice(0, n) for n in stored.size[lead:]]
        if rows is not None:
            bounds[lead] = rows
        wanted = ChunkStorageMetadata(
            torch.Size(b.start for b in bounds), torch.Size(b.stop - b.start for b in bounds)
        )
        result = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
        near = replace(stored, chunks=self._chunks(key, index))
        items = create_read_items_for_chunk_list(key, near, [wanted])
        try:
            self._reader.read_data(planner.LoadPlan(items), _Into(result)).wait()
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{self.folder}: tensor {key} cannot be read ({reason})") from None
        return result.reshape(result.shape[lead:])

    def row_blocks(self, key: str, index: tuple[int, ...] = ()) -> Iterator[slice]:
        """Yield the saved row blocks of a tensor; reading part of a block reads all of it."""
        dim, rows = len(index), self.tensor(key).size[len(index)]
        starts = {chunk.offsets[dim] for chunk in self._chunks(key, index)}
        yield from itertools.starmap(slice, itertools.pairwise([*sorted(starts), rows]))

    def _chunks(self, key: str, index: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """Return the saved blocks that overlap a layer and expert of a tensor."""
        if not index:
            return self.tensor(key).chunks
        found = self._by_index.get(key)
        if found is None:
            found = self._by_index[key] = defaultdict(list)
            for chunk in self.tensor(key).chunks:
                spans = zip(chunk.offsets, chunk.sizes[: len(index)], strict=False)
                for place in itertools.product(*(range(o, o + n) for o, n in spans)):
                    found[place].append(chunk)
        return found[index]


def read_metadata(folder: Path) -> metadata.Metadata:
    """Return a checkpoint's metadata; its pickle may name only metadata classes.

    Raises:
        ValueError: it is missing, damaged, or names anything else.
    """
    try:
        with (folder / METADATA).open("rb") as stream:
            return _OnlyMetadata(stream).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise ValueError(f"{folder}: not a whole Megatron checkpoint ({error})") from None


class _OnlyMetadata(pickle.Unpickler):
    """Unpickles the records of torch.distributed.checkpoint and plain values, nothing else."""

    modules = {module.__name__: module for module in (filesystem, metadata, planner)}
    names = (
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return a class by name.

        Raises:
            UnpicklingError: metadata does not need it.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        record = getattr(self.modules.get(module), name, None)
        is_record = isinstance(record, type) and record.__module__ == module
        if is_dtype or is_record or (module, name) in self.names:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which is not metadata")


class _Making(default_planner.DefaultSavePlanner):
    """Makes each piece when the writer asks for it."""

    def __init__(self, pieces: Sequence[Piece], done: Callable[[int], Any]):
        super().__init__()
        self.pieces = {piece.index: piece for piece in pieces}
        self._done = done

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the tensor to write, or the non-tensors."""
        if index.fqn == COMMON:
            return [{}]
        piece = self.pieces[index]
        tensor = piece.make()
        assert tensor.dtype == piece.dtype, piece.key
        self._done(piece.nbytes)
        return tensor.reshape(piece.shape)


class _Into(default_planner.DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, result: Tensor):
        super().__init__()
        self._result = result

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor, whichever part is read."""
        return self._result


def _files(pieces: Sequence[Piece]) -> Iterable[list[Piece]]:
    """Cut pieces, in order, into files of about equal bytes."""
    ends = itertools.accumulate(piece.nbytes for piece in pieces)
    numbered = zip((end // FILE for end in ends), pieces, strict=True)
    for _, part in itertools.groupby(numbered, key=lambda pair: pair[0]):
        yield [piece for _, piece in part]


def _item(piece: Piece) -> WriteItem:
    data = planner.TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape)),
        properties=metadata.TensorProperties(dtype=piece.dtype),
        size=torch.Size(piece.whole),
    )
    return WriteItem(piece.index, WriteItemType.SHARD, tensor_data=data)


def _encode(results: Iterable[WriteResult]) -> list[list]:
    return [
        [r.index.fqn, r.index.offset, r.index.index, r.size_in_bytes]
        + [r.storage_data.relative_path, r.storage_data.offset, r.storage_data.length]
        for r in results
    ]


def _decode(lines: Iterable[list]) -> list[WriteResult]:
    return [
        WriteResult(MetadataIndex(fqn, offset, index), size, filesystem._StorageInfo(*place))
        for fqn, offset, index, size, *place in lines
    ]
