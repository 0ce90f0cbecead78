"""Shared by all stand-ins: refusals, and call counts."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

calls: Counter[str] = Counter()  # of each kernel, by its name


def refuse(rule: str, *unless: bool) -> None:
    """Raise if a requirement of a kernel does not hold."""
    if not all(unless):
        raise RuntimeError(f"a kernel of Transformer Engine would refuse this: {rule}")


def counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the kernel to count its calls."""

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[kernel.__name__] += 1
        return kernel(*args, **kwargs)

    return call
