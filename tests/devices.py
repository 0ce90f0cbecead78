"""No GPU, but tensors that are on another device for torch and for our code.

Each wraps a CPU tensor and says its device is `meta`, which has no data of its own in torch, so
whatever the code would mix up on a GPU is refused here: an operation takes tensors of one device,
single numbers of any, and indices from the CPU. So is a sum whose bits depend on an order that a
GPU does not keep. Values are real, so a whole iteration runs.
"""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
INDEXING = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")


class Elsewhere(torch.Tensor):
    """A tensor of the other device; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @property
    def data(self):
        return Elsewhere(self.inner.detach())

    @data.setter
    def data(self, value: "Elsewhere") -> None:
        self.inner = value.inner
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        return _run(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """Run what is computed within on the other device where its tensors are there."""

    def __enter__(self):
        self._made = _Made()
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        return _run(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """Give tensors that are made from Python values to the other device: torch drops the values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_other(kwargs.get("device")):
            return Elsewhere(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.new_tensor and _is_other(args[0].device):
            return Elsewhere(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}))
        return func(*args, **kwargs)


def move(module: nn.Module) -> None:
    """Put all parameters of a module on the other device; mutates it."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                there = Elsewhere(parameter.detach())
                part._parameters[name] = nn.Parameter(there, parameter.requires_grad)


def _is_other(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _here(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    name = func._schema.name
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if name == "aten::copy_":
        _here(args[0]).copy_(_here(args[1]))
        return args[0]
    others = [t for t in tensors if isinstance(t, Elsewhere)]
    if others:
        _refuse_mixture(name, tensors, args)
    if others and name == "aten::scatter_add_":
        _refuse_any_order(*map(_here, args))
    is_other = bool(others)
    if kwargs.get("device") is not None:
        is_other, kwargs = _is_other(kwargs["device"]), {**kwargs, "device": "cpu"}
    result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    known = {id(_here(t)): t for t in tensors}  # what was changed in place stays what it was

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or id(value) in known:
            return known.get(id(value), value)
        return Elsewhere(value) if is_other else value

    return tree_map(wrapped, result)


def _refuse_any_order(
    target: torch.Tensor, dim: int, index: torch.Tensor, values: torch.Tensor
) -> None:
    """Raise if a sum depends on the order: a GPU adds the values of one place in any order."""
    orders = ((index, values), (index.flip(dim), values.flip(dim)))
    forth, back = (target.clone().scatter_add_(dim, *order) for order in orders)
    if not torch.equal(forth, back):
        raise RuntimeError("aten::scatter_add_ adds in any order")


def _refuse_mixture(name: str, tensors: list[torch.Tensor], args: tuple) -> None:
    strangers = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() > 0]
    if name in INDEXING and isinstance(args[0], Elsewhere):
        values = args[2:3]
        strangers = [t for t in values if isinstance(t, torch.Tensor) and t.dim() > 0]
        strangers = [t for t in strangers if not isinstance(t, Elsewhere)]
    if strangers:
        raise RuntimeError(f"{name} is given tensors of two devices")
