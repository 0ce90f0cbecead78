"""Which kernels a run computes with, and why: settings and the machine decide together.

`rules_precision` holds what follows from settings alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agrpo_megatron.machine import FLASH_ATTENTION, Machine, look, release
from agrpo_megatron.rules_precision import validate_widths
from agrpo_megatron.settings import Settings

TE_OLDEST = (2, 10)  # what Megatron-Core 0.19 asks for the newest of what is used here
AMPERE, ADA, HOPPER, BLACKWELL, WORKSTATION = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
CUDA_OF_BLOCKWISE = (12, 9)
INSTALL = "install it as docs/install.md says"
FUSED, SEPARATE = "added up by the product", "added up by a kernel of its own"
OPTIMIZERS = {
    "te": "Transformer Engine's fused Adam",
    "apex": "Apex's fused Adam",
    "torch": "torch's AdamW",
}


class Note(NamedTuple):
    """One choice, for `agrpo doctor`."""

    part: str
    chosen: str
    why: str  # and why nothing else


@dataclass(frozen=True)
class Kernels:
    """What a run computes with."""

    layer_spec: str  # local or te
    recipe: str | None  # of FP8; None where nothing is
    fuse_layer_gradients: bool  # gradients of the layers' weights are added up by the product
    fuse_head_gradient: bool  # the same for the head, which is Megatron's own layer
    flash_attention: int | None  # major version that batch-invariant attention is pinned to
    optimizer: str  # te, apex or torch
    notes: tuple[Note, ...]


def kernels_for(settings: Settings, *, phases: Sequence[str] = ()) -> Kernels:
    """Choose for this machine; `phases` (sft, rl) are those whose optimizer is to run.

    Raises:
        ValueError: the machine cannot do what the settings ask, with key, value, rule and fix.
    """
    return choose(settings, look(), phases=phases)


def choose(settings: Settings, machine: Machine, *, phases: Sequence[str] = ()) -> Kernels:
    """Choose for a machine; pure.

    Raises:
        ValueError: the machine cannot do what the settings ask, with key, value, rule and fix.
    """
    recipe, precision = _precision(settings, machine)
    layers = _layers(settings, machine)
    spec = layers.chosen
    optimizer, optimizer_why = _optimizer(settings, machine, phases)
    flash, invariant = _batch_invariant(settings, machine)
    in_layers, in_head = _layer_gradients(settings, machine, spec), _head_gradient(machine)
    notes = (
        layers,
        _attention(settings, machine, spec),
        _products(spec),
        precision,
        in_layers,
        in_head,
        Note("optimizer", OPTIMIZERS[optimizer], optimizer_why),
        invariant,
        _deterministic(settings, machine, spec),
        _graphs(settings, spec),
    )
    fused = in_layers.chosen == FUSED, in_head.chosen == FUSED
    return Kernels(spec, recipe, *fused, flash, optimizer, notes)


def _layers(settings: Settings, machine: Machine) -> Note:
    kernels, part = settings.kernels, "layers"
    if settings.precision == "fp32":
        return Note(part, "local", "precision=fp32: Transformer Engine has no attention for it")
    if kernels.layer_spec == "local":
        return Note(part, "local", "kernels.layer_spec=local")
    missing, fix = _te_missing(machine)
    wanted = {
        "kernels.layer_spec=te": (kernels.layer_spec == "te", "kernels.layer_spec=auto"),
        "precision=fp8": (settings.precision == "fp8", "precision=bf16"),
        "kernels.batch_invariant=true": (kernels.batch_invariant, "kernels.batch_invariant=false"),
        "kernels.cuda_graphs=true": (kernels.cuda_graphs, "kernels.cuda_graphs=false"),
    }
    for said, (is_set, instead) in wanted.items():
        if is_set and missing:
            raise ValueError(f"{said} needs {missing}; {fix}, or use {instead}")
    if missing:
        return Note(part, "local", f"te needs {missing}")
    return Note(part, "te", f"Transformer Engine {machine.te} and a GPU are found")


def _te_missing(machine: Machine) -> tuple[str, str]:
    """Return what Transformer Engine's layers need and do not find, and a fix; empty if nothing."""
    if machine.gpu is None:
        return "a GPU, and torch sees none", "run where there is one"
    if machine.capability < AMPERE:
        return f"an Ampere GPU or newer, and {_gpu(machine)}", "run on a newer one"
    te = "Transformer Engine"
    if machine.te_problem:
        return f"{te}, and {machine.te_problem}", INSTALL
    if release(machine.te or "") < TE_OLDEST:
        return f"{te} {_dotted(TE_OLDEST)} or newer, and it is {machine.te}", INSTALL
    return "", ""


def _precision(settings: Settings, machine: Machine) -> tuple[str | None, Note]:
    """Return the recipe of FP8, and what is said of the products' precision."""
    part, precision = "precision of products", settings.precision
    if precision != "fp8":
        why = f"precision={precision}" + (
            "; weights also in float32" if precision == "bf16" else ""
        )
        return None, Note(part, {"fp32": "float32", "bf16": "bfloat16"}[precision], why)
    if machine.gpu is None:
        raise ValueError("precision=fp8 needs a GPU, and torch sees none; use precision=bf16")
    if machine.capability < ADA:
        raise ValueError(
            f"precision=fp8 needs a Hopper GPU or newer, and {_gpu(machine)}; use precision=bf16"
        )
    recipe, said = settings.fp8.recipe, f"fp8.recipe={settings.fp8.recipe}"
    if recipe is None:
        recipe = _default_recipe(machine)
        said = f"fp8.recipe={recipe} (null)"
    _validate_recipe(recipe, said, machine)
    validate_widths(settings, recipe)
    why = f"{said}; head, embedding, norms and attention in bfloat16"
    if recipe == "blockwise" and machine.capability >= BLACKWELL:
        why += "; emulated on Blackwell, where mxfp8 is native"
    return recipe, Note(part, f"FP8 {recipe}", why)


def _default_recipe(machine: Machine) -> str:
    if machine.capability >= WORKSTATION:
        return "tensorwise"
    return "mxfp8" if machine.capability >= BLACKWELL else "blockwise"


def _validate_recipe(recipe: str, said: str, machine: Machine) -> None:
    """Check what Transformer Engine checks, but before anything is built."""
    capability = machine.capability
    if recipe == "mxfp8" and not BLACKWELL <= capability < WORKSTATION:
        instead = "blockwise" if capability >= HOPPER else "tensorwise"
        raise ValueError(
            f"{said} needs a Blackwell GPU of compute capability 10, and {_gpu(machine)}; use "
            f"fp8.recipe={instead}"
        )
    if recipe != "blockwise":
        return
    if capability < HOPPER:
        raise ValueError(
            f"{said} needs a Hopper GPU or newer, and {_gpu(machine)}; use fp8.recipe=tensorwise"
        )
    if machine.cuda < CUDA_OF_BLOCKWISE:
        raise ValueError(
            f"{said} needs CUDA {_dotted(CUDA_OF_BLOCKWISE)} or newer, and torch was built for "
            f"{_dotted(machine.cuda)}; install a torch for CUDA 13, or use fp8.recipe=tensorwise"
        )


def _attention(settings: Settings, machine: Machine, spec: str) -> Note:
    part = "attention"
    if spec == "local":
        return Note(part, "torch SDPA", "of the local layers; rows of equal length in one call")
    if settings.kernels.batch_invariant:
        return Note(part, "flash attention", "kernels.batch_invariant=true; cuDNN's is not")
    if machine.capability >= HOPPER:
        return Note(part, "cuDNN fused", "Transformer Engine's choice from Hopper on")
    if machine.flash_attention:
        return Note(part, "flash attention", "Transformer Engine's choice before Hopper")
    return Note(part, "cuDNN fused", "flash attention is not installed")


def _products(spec: str) -> Note:
    part = "norms, products, SwiGLU"
    if spec == "te":
        return Note(part, "Transformer Engine", "each norm is one module with the product after it")
    return Note(part, "torch", "of the local layers")


def _layer_gradients(settings: Settings, machine: Machine, spec: str) -> Note:
    part = "gradients of layers"
    if spec == "local":
        return _head_gradient(machine)._replace(part=part)
    if settings.kernels.batch_invariant:
        # Megatron's batch-invariant product overwrites where it should add.
        return Note(part, SEPARATE, "kernels.batch_invariant=true has products that cannot add")
    return Note(part, FUSED, "by Transformer Engine")


def _head_gradient(machine: Machine) -> Note:
    """Say how Megatron's own layers add gradients up; the head is one with either spec."""
    part = "gradient of the head"
    if machine.gpu is None:
        return Note(part, SEPARATE, "Apex's kernel for it needs a GPU")
    if not machine.apex_gradient:
        return Note(part, SEPARATE, "NVIDIA Apex has a kernel for it and is not installed with it")
    return Note(part, FUSED, "by NVIDIA Apex")


def _optimizer(settings: Settings, machine: Machine, phases: Sequence[str]) -> tuple[str, str]:
    """Return who updates the weights, as Megatron-Core chooses too, and why."""
    te_problem = machine.te_problem if machine.gpu else "it needs a GPU, and torch sees none"
    sections = {"sft": ("sft.optimizer", settings.sft.optimizer)}
    sections |= {"rl": ("optimizer", settings.optimizer)}
    for key, optimizer in (sections[phase] for phase in phases):
        for name in ("moments", "main_gradients"):
            value = getattr(optimizer, name)
            # What the CPU updates goes through torch's AdamW.
            if value != "fp32" and te_problem and not optimizer.offload:
                fix = f"{INSTALL}, or use" if machine.gpu else "use"
                raise ValueError(
                    f"{key}.{name}={value} needs Transformer Engine's fused Adam, and "
                    f"{te_problem}; {fix} {key}.{name}=fp32"
                )
    if machine.gpu is None:
        return "torch", "fused ones of Transformer Engine and Apex need a GPU"
    if not te_problem:
        return "te", "the first that Megatron-Core takes"
    if machine.apex_adam:
        return "apex", f"Transformer Engine's comes first, and {te_problem}"
    return "torch", f"Transformer Engine: {te_problem}; NVIDIA Apex: not found with its kernels"


def _batch_invariant(settings: Settings, machine: Machine) -> tuple[int | None, Note]:
    """Return the flash attention that batch-invariant attention is pinned to, and the note."""
    part, said = "batch-invariant", "kernels.batch_invariant"
    if not settings.kernels.batch_invariant:
        return None, Note(
            part, "no", f"{said}=false: the rows beside a row may change its rounding"
        )
    if machine.capability < HOPPER:
        raise ValueError(
            f"{said}=true needs a Hopper GPU or newer, and {_gpu(machine)}; use {said}=false"
        )
    # Transformer Engine takes version 3 on Hopper alone, and there before version 4.
    fitting = (3, 4) if machine.capability < BLACKWELL else (4,)
    for version in fitting:
        if version in machine.flash_attention:
            return version, Note(part, "yes", f"{said}=true; flash attention {version}")
    names = " or ".join(FLASH_ATTENTION[version] for version in fitting)
    raise ValueError(
        f"{said}=true needs {names} on this GPU, and it is not installed; {INSTALL}, or use "
        f"{said}=false"
    )


def _deterministic(settings: Settings, machine: Machine, spec: str) -> Note:
    part = "deterministic"
    if not settings.kernels.deterministic:
        why = "kernels.deterministic=false: a GPU may add up in another order next time"
        return Note(part, *(("no", why) if machine.gpu else ("yes", "a CPU repeats bit by bit")))
    why = "kernels.deterministic=true"
    # cuDNN's deterministic backward of packed rows wants 128 bytes for each score there.
    is_hopper = HOPPER <= machine.capability < BLACKWELL
    if spec == "te" and is_hopper and not machine.flash_attention:
        why += (
            "; from batch * heads * length^2 of 2^30 on, attention is Transformer Engine's "
            "unfused one, slow and large, unless flash-attn or flash-attn-3 is installed"
        )
    return Note(part, "yes", why)


def _graphs(settings: Settings, spec: str) -> Note:
    part = "CUDA graphs"
    if settings.kernels.cuda_graphs:
        return Note(part, "rollout", "kernels.cuda_graphs=true; one graph for each length")
    why = "kernels.cuda_graphs=false" if spec == "te" else "the local layers have none"
    return Note(part, "no", why)


def _gpu(machine: Machine) -> str:
    """Say as a clause which GPU is here."""
    return f"{machine.gpu} has compute capability {_dotted(machine.capability)}"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
