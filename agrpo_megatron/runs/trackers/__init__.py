"""Copies of a run's metrics for wandb and TensorBoard, under equal names."""

from collections.abc import Mapping
from typing import Any


def named_scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of metrics under its phase's name, as `rl/reward/mean`.

    A list becomes `NAME/0`, `NAME/1`, ...; a missing value of it is left out.
    """
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{record['phase']}/{key}"
        if isinstance(value, list):
            found |= {f"{name}/{n}": part for n, part in enumerate(value) if part is not None}
        elif key != "phase":
            found[name] = value
    return found
