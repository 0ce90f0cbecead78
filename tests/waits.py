"""Count what would make the host wait for a GPU, on the device of `tests.devices`.

    with Waits() as waits:
        ...
    waits.seen                  # what the host waited for, in order

Counted is what makes torch call cudaStreamSynchronize:

- a number read from the device: `item`, `int`, `bool`, and what reads one inside, such as `equal`;
- a result whose size depends on values: `nonzero`, a mask as an index, `unique`, `isin`,
  `repeat_interleave` without `output_size`;
- a copy to the host, also `tolist`;
- a copy to the device that blocks: `torch.tensor(..., device=...)`, lists and host tensors as
  indices, `to` without `non_blocking`.

A `non_blocking` copy to the device is not counted. It waits nevertheless if its source is not
pinned; whether it is cannot be seen without a GPU. Waits inside kernels, libraries and collectives
are not seen either.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.devices import DEVICE, INDEXING, Elsewhere, OtherDevice

SIZES = ("nonzero", "masked_select", "bincount", "isin")
READS = ("_local_scalar_dense", "equal", "is_nonzero")


class Waits(OtherDevice):
    """The other device, with a list of what its host waits for."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __enter__(self):
        super().__enter__()
        self._calls = _Calls(self.seen)
        self._calls.__enter__()
        return self

    def __exit__(self, *error):
        self._calls.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        self.seen += _waits(func._schema.name, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Calls(TorchFunctionMode):
    """Note copies that torch makes before an operation is dispatched."""

    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None:
            self.seen += ["tensor"] * (torch.device(device) == DEVICE)
        if func is Tensor.new_tensor:
            self.seen += ["new_tensor"] * isinstance(args[0], Elsewhere)
        return func(*args, **kwargs)


def _waits(name: str, args: tuple, kwargs: dict) -> list[str]:
    """Return what an operation makes the host wait for."""
    short = name.removeprefix("aten::")
    first = args[0] if args else None
    if name in INDEXING and isinstance(first, Elsewhere):
        return [found for index in args[1] if (found := _wait_of_index(index))]
    if short == "_to_copy":
        return _wait_of_copy(first, kwargs.get("device"), kwargs.get("non_blocking", False))
    if short == "copy_":
        return _wait_of_copy(args[1], args[0].device, len(args) > 2 and args[2])
    if not any(isinstance(arg, Elsewhere) for arg in args):
        return []
    if short == "repeat_interleave" and kwargs.get("output_size") is not None:
        return []
    is_counted = short in (*SIZES, *READS, "repeat_interleave") or "unique" in short
    return [short] if is_counted else []


def _wait_of_index(index: Any) -> str | None:
    if not isinstance(index, Tensor):
        return None
    if not isinstance(index, Elsewhere):
        return "host tensor as index"
    return "mask as index" if index.dtype in (torch.bool, torch.uint8) else None


def _wait_of_copy(source: Any, device: Any, is_free: bool) -> list[str]:  # noqa: FBT001
    if device is None:
        return []
    to_device, from_device = torch.device(device) == DEVICE, isinstance(source, Elsewhere)
    if to_device == from_device or (to_device and is_free):
        return []
    return ["copy to the device" if to_device else "copy to the host"]
