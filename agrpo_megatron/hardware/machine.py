"""What this machine offers: its GPU, and optional packages with kernels.

Importing this module loads none of them. A broken part is reported, never raised.
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
FLASH_ATTENTION = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}  # their packages
AMPERE, ADA, HOPPER, BLACKWELL, WORKSTATION = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
TE_ATTENTION = "transformer_engine.pytorch.attention.dot_product_attention.utils"
TE_OLDEST = (2, 10)  # Megatron-Core 0.19 needs it for the newest features used here
CUDA_OF_BLOCKWISE = (12, 9)
INSTALL = "install it as docs/install.md says"


class Missing(NamedTuple):
    """A requirement that this machine does not meet."""

    what: str  # the object of `needs`
    instead: str  # what the machine has, as a clause
    fix: str

    def __str__(self) -> str:
        return f"{self.what}, and {self.instead}"


NO_GPU = Missing("a GPU", "torch sees none", "run where there is one")


@dataclass(frozen=True)
class Machine:
    """Hardware and packages that a run may use."""

    gpu: str | None = None  # its name
    capability: tuple[int, int] = (0, 0)  # compute capability of the GPU
    cuda: tuple[int, ...] = ()  # version torch was built for
    te: str | None = None  # version of Transformer Engine, if installed
    te_problem: str = MISSING  # why it cannot be used, as a clause; empty if it can
    apex_adam: bool = False  # Apex's fused optimizer and its kernels
    apex_gradient: bool = False  # Apex's GEMM that accumulates weight gradients
    flash_attention: tuple[int, ...] = ()  # major versions that Transformer Engine can use


@functools.cache
def look() -> Machine:
    """Look at this rank's GPU and the installed packages; raises nothing.

    Packages with kernels are imported only if there is a GPU to run them.
    """
    device = None
    try:
        with quiet():
            torch = importlib.import_module("torch")
            if torch.cuda.is_available():
                index = device_index(torch.cuda.device_count())
                device = torch.cuda.get_device_properties(index)
    except Exception:  # torch without a working driver: no GPU
        return Machine()
    te, cuda = version("transformer-engine") or None, release(torch.version.cuda or "")
    if device is None:
        return Machine(cuda=cuda, te=te, te_problem="there is no GPU for it" if te else MISSING)
    return Machine(
        gpu=device.name,
        capability=(device.major, device.minor),
        cuda=cuda,
        te=te,
        te_problem=import_problem("transformer_engine.pytorch"),
        apex_adam=not apex_problem(),
        apex_gradient=not import_problem("fused_weight_gradient_mlp_cuda"),
        flash_attention=_flash_attention(),
    )


def device_index(count: int) -> int:
    """Return which of the visible GPUs is this rank's.

    A launcher shows each rank all GPUs of the machine, or only its own.
    """
    return int(os.environ.get("LOCAL_RANK", "0")) % count


def te_missing(machine: Machine) -> Missing | None:
    """Return what the layers of Transformer Engine lack here, or None."""
    missing = _older(machine, AMPERE, "an Ampere") or fused_adam_missing(machine)
    if missing is None and release(machine.te or "") < TE_OLDEST:
        newer = f"Transformer Engine {_dotted(TE_OLDEST)} or newer"
        return Missing(newer, f"it is {machine.te}", INSTALL)
    return missing


def fp8_missing(machine: Machine) -> Missing | None:
    """Return what FP8 lacks here, or None."""
    return _older(machine, ADA, "a Hopper") or te_missing(machine)


def default_recipe(machine: Machine) -> str:
    """Return the GPU's native FP8 recipe that keeps no state."""
    if machine.capability >= WORKSTATION:
        return "tensorwise"
    return "mxfp8" if machine.capability >= BLACKWELL else "blockwise"


def recipe_missing(recipe: str, machine: Machine) -> Missing | None:
    """Return what an FP8 recipe lacks here beyond FP8 itself; the checks of Transformer Engine."""
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
        built = f"torch was built for {_dotted(machine.cuda)}"
        fix = f"install a torch for CUDA 13, or {tensorwise}"
        return Missing(f"CUDA {_dotted(CUDA_OF_BLOCKWISE)} or newer", built, fix)
    return None


def invariant_flash(machine: Machine) -> int | Missing:
    """Return the version of a batch-invariant flash attention, or what is missing for it."""
    if missing := _older(machine, HOPPER, "a Hopper") or te_missing(machine):
        return missing
    # Transformer Engine uses version 3 only on Hopper, and prefers it there to version 4.
    fitting = (3, 4) if machine.capability < BLACKWELL else (4,)
    found = [major for major in fitting if major in machine.flash_attention]
    if found:
        return found[0]
    return Missing(" or ".join(FLASH_ATTENTION[each] for each in fitting), MISSING, INSTALL)


def deterministic_flash(machine: Machine) -> int | None:
    """Return the version of a flash attention that Hopper's backward pass can repeat, or None."""
    return next((major for major in (3, 2) if major in machine.flash_attention), None)


def fused_adam_missing(machine: Machine) -> Missing | None:
    """Return what Transformer Engine's fused Adam lacks here, or None."""
    if machine.gpu is None:
        return NO_GPU
    problem = machine.te_problem
    return Missing("Transformer Engine", problem, INSTALL) if problem else None


def import_problem(module: str) -> str:
    """Import `module`; return its problem as a clause, empty if it works."""
    try:
        with quiet():
            importlib.import_module("torch")  # loads the libraries that extensions link to
            importlib.import_module(module)
    except Exception as error:
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        is_absent = name and f"{module}.".startswith(f"{name}.")
        return MISSING if is_absent else f"it is broken: {one_line(error)}"
    return ""


def apex_problem() -> str:
    """Return why NVIDIA's fused optimizer cannot be used, as a clause; empty if it can."""
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
    """Silence imports: the caller reports missing packages once."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def version(distribution: str) -> str:
    """Return an installed distribution's version; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def release(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version; empty if it has none."""
    return tuple(int(number) for number in text.split(".")[:2] if number.isdecimal())


def one_line(error: Exception) -> str:
    """Return an error's type and the beginning of its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _flash_attention() -> tuple[int, ...]:
    """Return the installed major versions; 2 only within the bounds of Transformer Engine.

    It does not use releases that are too new, and older ones than 2.4.1 are not deterministic.
    """
    installed = [major for major, name in FLASH_ATTENTION.items() if version(name)]
    if 2 in installed:
        try:
            with quiet():
                usable = importlib.import_module(TE_ATTENTION).FlashAttentionUtils.v2_4_1_plus
        except Exception:  # without Transformer Engine nothing uses it
            usable = False
        installed = installed if usable else [major for major in installed if major != 2]
    return tuple(installed)


def _older(machine: Machine, least: tuple[int, int], name: str) -> Missing | None:
    """Return the newer GPU that is missing, if this one is below a compute capability."""
    if machine.gpu is None or machine.capability >= least:
        return None
    return Missing(f"{name} GPU or newer", _gpu(machine), "run on a newer one")


def _gpu(machine: Machine) -> str:
    """Return the GPU's name and compute capability, as a clause."""
    return f"{machine.gpu} has compute capability {_dotted(machine.capability)}"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
