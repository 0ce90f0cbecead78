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
from typing import NamedTuple

MISSING = "it is not installed"
FLASH_ATTENTION = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}  # its packages
AMPERE, ADA, HOPPER, BLACKWELL, WORKSTATION = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
TE_OLDEST = (2, 10)  # what Megatron-Core 0.19 asks for the newest of what is used here
CUDA_OF_BLOCKWISE = (12, 9)
INSTALL = "install it as docs/install.md says"


class Missing(NamedTuple):
    """What something needs that is not here."""

    what: str  # the object of `needs`
    instead: str  # what is here, as a clause
    fix: str

    def __str__(self) -> str:
        return f"{self.what}, and {self.instead}"


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


def te_missing(machine: Machine) -> Missing | None:
    """Say what the layers of Transformer Engine need that is not here."""
    if machine.gpu is None:
        return Missing("a GPU", "torch sees none", "run where there is one")
    if machine.capability < AMPERE:
        return Missing("an Ampere GPU or newer", _gpu(machine), "run on a newer one")
    te = "Transformer Engine"
    if machine.te_problem:
        return Missing(te, machine.te_problem, INSTALL)
    if release(machine.te or "") < TE_OLDEST:
        return Missing(f"{te} {_dotted(TE_OLDEST)} or newer", f"it is {machine.te}", INSTALL)
    return None


def fp8_missing(machine: Machine) -> Missing | None:
    """Say what FP8 needs that is not here."""
    if machine.gpu is not None and machine.capability < ADA:
        return Missing("a Hopper GPU or newer", _gpu(machine), "run on a newer one")
    return te_missing(machine)


def default_recipe(machine: Machine) -> str:
    """Return the FP8 recipe that is native to the GPU, and keeps no state."""
    if machine.capability >= WORKSTATION:
        return "tensorwise"
    return "mxfp8" if machine.capability >= BLACKWELL else "blockwise"


def recipe_missing(recipe: str, machine: Machine) -> Missing | None:
    """Say what an FP8 recipe needs beyond FP8 itself; as Transformer Engine checks too."""
    capability = machine.capability
    tensorwise = "use fp8.recipe=tensorwise"
    if recipe == "mxfp8" and not BLACKWELL <= capability < WORKSTATION:
        fix = "use fp8.recipe=blockwise" if capability >= HOPPER else tensorwise
        return Missing("a Blackwell GPU (10.x)", _gpu(machine), fix)
    if recipe != "blockwise":
        return None
    if capability < HOPPER:
        return Missing("a Hopper GPU or newer", _gpu(machine), tensorwise)
    if machine.cuda < CUDA_OF_BLOCKWISE:
        return Missing(
            f"CUDA {_dotted(CUDA_OF_BLOCKWISE)} or newer",
            f"torch was built for {_dotted(machine.cuda)}",
            f"install a torch for CUDA 13, or {tensorwise}",
        )
    return None


def invariant_flash(machine: Machine) -> int | Missing:
    """Return the flash attention that can ignore what else is in a batch, or what it needs."""
    if machine.gpu is not None and machine.capability < HOPPER:
        return Missing("a Hopper GPU or newer", _gpu(machine), "run on a newer one")
    if missing := te_missing(machine):
        return missing
    # Transformer Engine takes version 3 on Hopper alone, and there before version 4.
    fitting = (3, 4) if machine.capability < BLACKWELL else (4,)
    for version in fitting:
        if version in machine.flash_attention:
            return version
    return Missing(" or ".join(FLASH_ATTENTION[each] for each in fitting), MISSING, INSTALL)


def fused_adam_missing(machine: Machine) -> Missing | None:
    """Say what Transformer Engine's fused Adam needs that is not here."""
    if machine.gpu is None:
        return Missing("a GPU", "torch sees none", "run where there is one")
    problem = machine.te_problem
    return Missing("Transformer Engine", problem, INSTALL) if problem else None


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


def _gpu(machine: Machine) -> str:
    """Say as a clause which GPU is here."""
    return f"{machine.gpu} has compute capability {_dotted(machine.capability)}"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
