"""What this machine offers: its GPU, and the optional packages that bring kernels.

Importing this module loads none of them. A part that is broken is told, never raised.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MISSING = "it is not installed"
FLASH_ATTENTION = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}  # its packages


@dataclass(frozen=True)
class Machine:
    """What a run may compute with."""

    gpu: str | None = None  # its name
    capability: tuple[int, int] = (0, 0)  # compute capability of the GPU
    cuda: tuple[int, ...] = ()  # version that torch was built for
    te: str | None = None  # version of Transformer Engine, where it is installed
    te_problem: str = MISSING  # why it cannot be used, as a clause; empty where it can
    apex_adam: bool = False  # Apex's fused optimizer and its kernels
    apex_gradient: bool = False  # Apex's kernel that adds weight gradients up as it computes them
    flash_attention: tuple[int, ...] = ()  # major versions that are installed


@functools.cache
def look() -> Machine:
    """Look at this rank's GPU and the packages beside it; raises nothing.

    Packages with kernels are imported only where there is a GPU to run them.
    """
    try:
        with quiet():
            torch = importlib.import_module("torch")
            here = torch.cuda.is_available()
            index = (
                int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count() if here else 0
            )
            device = torch.cuda.get_device_properties(index) if here else None
    except Exception:  # a torch without a working driver has no GPU to offer
        return Machine()
    te = version("transformer-engine") or None
    if device is None:
        problem = "there is no GPU for it" if te else MISSING
        return Machine(cuda=release(torch.version.cuda or ""), te=te, te_problem=problem)
    return Machine(
        gpu=device.name,
        capability=(device.major, device.minor),
        cuda=release(torch.version.cuda or ""),
        te=te,
        te_problem=import_problem("transformer_engine.pytorch") or "",
        apex_adam=not apex_problem(),
        apex_gradient=not import_problem("fused_weight_gradient_mlp_cuda"),
        flash_attention=tuple(major for major, name in FLASH_ATTENTION.items() if version(name)),
    )


def import_problem(module: str) -> str:
    """Import `module` and say as a clause what is wrong with it; empty if nothing is."""
    try:
        with quiet():
            importlib.import_module("torch")  # its libraries are those that extensions look for
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return MISSING
        return f"it is broken: {one_line(error)}"
    except Exception as error:
        return f"it is broken: {one_line(error)}"
    return ""


def apex_problem() -> str:
    """Say as a clause why NVIDIA's fused optimizer cannot be used; empty if it can."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return MISSING
    folders = [Path(folder, "optimizers") for folder in spec.submodule_search_locations or ()]
    if not any(folder.is_dir() for folder in folders):
        return "it is another project named apex"
    problem = import_problem("apex.optimizers")
    if not problem and import_problem("amp_C"):
        return "it was built without its kernels"
    return problem


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep imports from talking: what is absent is told once, by whoever asked."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def version(distribution: str) -> str:
    """Return an installed distribution's version; empty where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def release(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version; none where it has none."""
    return tuple(int(number) for number in text.split(".")[:2] if number.isdecimal())


def one_line(error: Exception) -> str:
    """Return an error's type and the beginning of its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
