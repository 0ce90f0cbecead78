"""Which kernels a run computes with, and why: settings and the machine decide together.

`rules_precision` checks what follows from settings only; `machine` knows what each kernel needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agrpo_megatron.config.rules.precision import optimizers, validate_recipe
from agrpo_megatron.config.settings import KernelSettings, OptimizerSettings, Settings
from agrpo_megatron.hardware.machine import (
    BLACKWELL,
    HOPPER,
    NO_GPU,
    Machine,
    Missing,
    default_recipe,
    deterministic_flash,
    fp8_missing,
    fused_adam_missing,
    invariant_flash,
    look,
    recipe_missing,
    te_missing,
)
from agrpo_megatron.hardware.workspace import LIMIT, largest_budget, training_workspace

# A weight gradient is accumulated over micro-batches inside the GEMM that computes it, or after it.
FUSED, SEPARATE = "fused", "separate"
SDPA, FLEX = "torch SDPA", "FlexAttention"
OPTIMIZERS = {"te": "TE fused Adam", "apex": "Apex fused Adam", "torch": "torch AdamW"}


class Note(NamedTuple):
    """One choice, for `agrpo doctor`."""

    part: str
    chosen: str
    why: str  # and why no other


@dataclass(frozen=True)
class Kernels:
    """The kernels of a run."""

    layer_spec: str  # local or te
    recipe: str | None  # of FP8; None without FP8
    fuse_layer_gradients: bool  # GEMMs accumulate the weight gradients of the layers
    fuse_head_gradient: bool  # the same for the head, which is Megatron's own layer
    flash_attention: int | None  # major version that attention must use; None: the layers choose
    flex_attention: bool  # whether rows with patterns go through FlexAttention
    optimizer: str  # te, apex or torch
    notes: tuple[Note, ...]


def kernels_for(settings: Settings, *, phases: Sequence[str] = ()) -> Kernels:
    """Choose for this machine; `phases` (sft, rl) are the phases to train.

    Raises:
        ValueError: the machine cannot do what the settings ask, with key, value, rule and fix.
    """
    return choose(settings, look(), phases=phases)


def choose(settings: Settings, machine: Machine, *, phases: Sequence[str] = ()) -> Kernels:
    """Choose for a machine; pure.

    Raises:
        ValueError: the machine cannot do what the settings ask, with key, value, rule and fix.
    """
    switches = settings.kernels
    recipe, precision = _precision(settings, machine)
    if recipe is not None:
        validate_recipe(settings, recipe)
    layers = _layers(settings.precision, switches, machine)
    spec = layers.chosen
    optimizer, adam = _optimizer(optimizers(settings, phases), machine)
    invariant_flash, invariant = _batch_invariant(switches, machine)
    repeating_flash, deterministic = _deterministic(settings, machine, spec, phases)
    flash = invariant_flash or repeating_flash
    attention = _attention(switches, machine, spec, flash)
    if settings.has_patterns:
        attention = _block_attention(switches, machine)
    in_layers, in_head = _layer_gradients(machine, spec), _head_gradient(machine)
    notes = (
        layers,
        attention,
        _products(spec),
        precision,
        in_layers,
        in_head,
        adam,
        invariant,
        deterministic,
        _graphs(switches, machine),
    )
    fused = in_layers.chosen == FUSED, in_head.chosen == FUSED
    return Kernels(spec, recipe, *fused, flash, attention.chosen == FLEX, optimizer, notes)


def in_one_line(kernels: Kernels) -> str:
    """Return the kernels of a run as text, with the reason where layers are not `te`."""
    chosen = {note.part: note for note in kernels.notes}
    layers = chosen["layers"]
    why = f" ({layers.why})" if kernels.layer_spec == "local" else ""
    parts = (chosen[part].chosen for part in ("attention", "precision", "optimizer"))
    return f"kernels: layers {layers.chosen}{why}, {', '.join(parts)}"


def _layers(precision: str, switches: KernelSettings, machine: Machine) -> Note:
    part = "layers"
    if precision == "fp32":
        return Note(part, "local", "te has no attention for precision=fp32")
    if switches.layer_spec == "local":
        return Note(part, "local", "kernels.layer_spec=local")
    missing = te_missing(machine)
    if missing is None:
        return Note(part, "te", f"Transformer Engine {machine.te} on {machine.gpu}")
    if switches.layer_spec == "te":
        raise _refusal("kernels.layer_spec=te", missing, "kernels.layer_spec=auto")
    if switches.cuda_graphs:
        raise _refusal("kernels.cuda_graphs=true", missing, "kernels.cuda_graphs=false")
    return Note(part, "local", f"te needs {missing}")


def _precision(settings: Settings, machine: Machine) -> tuple[str | None, Note]:
    """Return the FP8 recipe, and the note on how matrix products are computed."""
    part, missing, asked = "precision", fp8_missing(machine), settings.fp8.recipe
    recipe = asked or default_recipe(machine)
    if settings.precision != "fp8":
        lacks = missing or recipe_missing(recipe, machine)
        why = f"fp8 needs {lacks.what}" if lacks else f"fp8 would be {recipe}"
        name = {"fp32": "float32", "bf16": "bfloat16"}[settings.precision]
        return None, Note(part, name, f"precision={settings.precision}; {why}")
    if missing:
        raise _refusal("precision=fp8", missing, "precision=bf16")
    said = f"fp8.recipe={asked}" if asked else f"fp8.recipe=null, here {recipe},"
    if lacks := recipe_missing(recipe, machine):
        raise ValueError(f"{said} needs {lacks}; {lacks.fix}")
    why = "products of the layers; all else is bfloat16"
    if recipe == "blockwise" and machine.capability >= BLACKWELL:
        why += "; emulated on Blackwell, where mxfp8 is native"
    return recipe, Note(part, f"FP8 {recipe}", why)


def _attention(switches: KernelSettings, machine: Machine, spec: str, pinned: int | None) -> Note:
    part, flash = "attention", "flash attention"
    if spec == "local":
        return Note(part, SDPA, "of the local layers")
    if switches.batch_invariant:
        return Note(part, flash, "kernels.batch_invariant=true; cuDNN's is not")
    if pinned:
        return Note(part, flash, "kernels.deterministic=true; cuDNN's needs too much memory")
    if machine.capability >= HOPPER:
        return Note(part, "cuDNN fused", "Transformer Engine's choice from Hopper on")
    if machine.flash_attention:
        return Note(part, flash, "Transformer Engine's choice before Hopper")
    return Note(part, "cuDNN fused", f"{flash} is not installed")


def _block_attention(switches: KernelSettings, machine: Machine) -> Note:
    """Return the attention of a block model, whose patterns no fused kernel knows."""
    part, said = "attention", "kernels.block_attention"
    if machine.gpu is None:
        if switches.block_attention == "flex":
            needs = NO_GPU._replace(what="a GPU: torch has no backward pass of it on a CPU")
            raise _refusal(f"{said}=flex", needs, f"{said}=sdpa")
        return Note(part, SDPA, "FlexAttention needs a GPU")
    if switches.block_attention == "sdpa":
        return Note(part, SDPA, f"{said}=sdpa")
    return Note(part, FLEX, "it skips what blocks do not see")


def _products(spec: str) -> Note:
    part = "norms and products"
    if spec == "te":
        return Note(part, "Transformer Engine", "a norm and the product after it are one module")
    return Note(part, "torch", "of the local layers")


def _layer_gradients(machine: Machine, spec: str) -> Note:
    part = "gradients of layers"
    if spec == "local":
        return _head_gradient(machine)._replace(part=part)
    return Note(part, FUSED, "by Transformer Engine")


def _head_gradient(machine: Machine) -> Note:
    """Return how Megatron's own layers accumulate gradients; the head always is one of them."""
    part = "gradient of the head"
    if machine.gpu is None:
        return Note(part, SEPARATE, "fused needs a GPU")
    if not machine.apex_gradient:
        return Note(part, SEPARATE, "fused needs NVIDIA Apex with its weight gradients")
    return Note(part, FUSED, "by NVIDIA Apex")


def _optimizer(trained: Mapping[str, OptimizerSettings], machine: Machine) -> tuple[str, Note]:
    """Return the optimizer, by the rules of Megatron-Core, and the note.

    Args:
        trained: the optimizer of each phase, by the section it is written in.
    """
    missing = fused_adam_missing(machine)
    for key, optimizer in trained.items():
        if optimizer.offload and machine.gpu is None:
            needs = NO_GPU._replace(what="a GPU to move states from")
            raise _refusal(f"{key}.offload={optimizer.offload:g}", needs, f"{key}.offload=0")
        for name in ("moments", "main_gradients"):
            value = getattr(optimizer, name)
            # torch's AdamW updates the offloaded states.
            if missing and value != "fp32" and not optimizer.offload:
                raise _refusal(f"{key}.{name}={value}", missing, f"{key}.{name}=fp32")
    if missing is None:
        name, why = "te", "Megatron-Core's first choice"
    elif machine.gpu and machine.apex_adam:
        name, why = "apex", "Transformer Engine's would come first"
    else:
        needs = "Transformer Engine or NVIDIA Apex" if machine.gpu else "a GPU"
        name, why = "torch", f"a fused one needs {needs}"
    return name, Note("optimizer", OPTIMIZERS[name], why)


def _batch_invariant(switches: KernelSettings, machine: Machine) -> tuple[int | None, Note]:
    """Return the flash attention version of batch-invariant attention, and the note."""
    part, said = "batch-invariant", "kernels.batch_invariant"
    found = invariant_flash(machine)
    if not switches.batch_invariant:
        missing = found if isinstance(found, Missing) else None
        return None, Note(part, "no", _off(said, missing))
    if isinstance(found, Missing):
        raise _refusal(f"{said}=true", found, f"{said}=false")
    return found, Note(part, "yes", f"{said}=true, by flash attention {found}")


def _deterministic(
    settings: Settings, machine: Machine, spec: str, phases: Sequence[str]
) -> tuple[int | None, Note]:
    """Return the flash attention version that replaces cuDNN's attention, or None, and the note."""
    part, said = "deterministic", "kernels.deterministic"
    if machine.gpu is None:
        return None, Note(part, "yes", "CPU kernels are deterministic")
    if not settings.kernels.deterministic:
        return None, Note(part, "no", _off(said, None))
    why = f"{said}=true"
    is_hopper = HOPPER <= machine.capability < BLACKWELL
    is_cudnn = spec == "te" and is_hopper and not settings.kernels.batch_invariant
    if not is_cudnn or not settings.model.is_known or settings.has_patterns:
        return None, Note(part, "yes", why)
    budget = settings.train.token_budget
    bytes_needed = training_workspace(settings, budget)
    if bytes_needed <= LIMIT:
        return None, Note(part, "yes", why)
    needs = f"cuDNN's attention would reserve {_gib(bytes_needed)} for train.token_budget={budget}"
    if flash := deterministic_flash(machine):
        return flash, Note(part, "yes", f"{why}, by flash attention {flash}: {needs}")
    if not phases:
        return None, Note(part, "yes", f"{why}; in training {needs}")
    fits = largest_budget(settings)
    lower = f"use train.token_budget={fits} or less, " if fits else ""
    raise ValueError(
        f"{why}: {needs}, and {_gib(LIMIT)} is the most; {lower}install flash-attn (2.4.1 or "
        f"newer) or flash-attn-3 as docs/install.md says, or use {said}=false"
    )


def _graphs(switches: KernelSettings, machine: Machine) -> Note:
    part, said = "CUDA graphs", "kernels.cuda_graphs"
    if switches.cuda_graphs:
        return Note(part, "rollout", f"{said}=true, one for each length")
    return Note(part, "no", _off(said, te_missing(machine)))


def _off(key: str, missing: Missing | None) -> str:
    """Return why a switch is off: the machine cannot, or the setting."""
    return f"{key}=true needs {missing.what}" if missing else f"{key} is off"


def _gib(count: int) -> str:
    return f"{count / 2**30:.0f} GiB"


def _refusal(said: str, missing: Missing, instead: str) -> ValueError:
    return ValueError(f"{said} needs {missing}; {missing.fix}, or use {instead}")
