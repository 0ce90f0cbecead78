"""Checks before any rank starts: settings passed to Megatron by name, and stored rollouts."""

from dataclasses import replace

from agrpo_megatron.config.rules.precision import optimizers
from agrpo_megatron.config.rules.profile import validate_profile
from agrpo_megatron.config.settings import Fp8Settings, KernelSettings, Settings
from agrpo_megatron.hardware.kernels import kernels_for
from agrpo_megatron.runs.resolve import Planned, Resolved
from agrpo_megatron.runs.stored_rollouts import check_replay


def check_start(resolved: Resolved | Planned, world_size: int) -> None:
    """Check what a run that is about to start needs besides correct settings.

    Raises:
        ValueError: as `validate_profile`, `check_passed` and `check_replay`.
    """
    validate_profile(resolved.settings, world_size)
    check_passed(resolved.settings)
    check_replay(resolved)


def check_passed(settings: Settings) -> None:
    """Build Megatron's records of complete settings as the ranks will, if any name is passed on.

    On a machine without the kernels that the settings ask for, such as a login node, the records
    are those of plain bfloat16.

    Raises:
        ValueError: Megatron refuses a value or has no field of a name.
    """
    every = optimizers(settings, ("sft", "rl"))
    if not (settings.model.megatron or settings.ddp or any(o.megatron for o in every.values())):
        return
    # Megatron takes seconds to load.
    from agrpo_megatron.megatron.engine import ddp_config, optimizer_config
    from agrpo_megatron.megatron.layers.config import transformer_config

    try:
        kernels_for(settings, phases=("sft", "rl"))
    except ValueError:
        plain = {"moments": "fp32", "main_gradients": "fp32", "offload": 0.0}
        every = {key: replace(optimizer, **plain) for key, optimizer in every.items()}
        settings = replace(settings, precision="bf16", fp8=Fp8Settings(), kernels=KernelSettings())
    config = transformer_config(settings, settings.parallel, stage=0)
    for key, optimizer in every.items():
        optimizer_config(optimizer, config, key=key)
        ddp_config(settings.ddp, optimizer, config)
