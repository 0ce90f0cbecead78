"""Rules of a supervised phase that learns from preference pairs."""

from dataclasses import fields

from agrpo_megatron.config.settings import Settings, SftSettings
from agrpo_megatron.config.settings.preferences import PreferenceSettings
from agrpo_megatron.config.values import text

# What chooses replies and weighs masks of single examples; pairs have ways of their own.
OF_DENOISING = ("turns", "mask_epsilon", "diffusion_weight", "autoregressive_weight")


def validate_preferences(settings: Settings) -> None:
    """Check that settings of pairs are set for pairs only, and fit the rest of the run.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    sft, default = settings.sft, PreferenceSettings()
    if sft.loss != "vrpo":
        for field in fields(PreferenceSettings):
            value, usual = getattr(sft.preferences, field.name), getattr(default, field.name)
            if value != usual:
                raise ValueError(
                    f"sft.preferences.{field.name}={text(value)} is for preference pairs, and "
                    f"sft.loss is {sft.loss}; set sft.loss=vrpo, or use "
                    f"sft.preferences.{field.name}={text(usual)}"
                )
        return
    if sft.data is None:
        raise ValueError(
            "sft.loss=vrpo learns from pairs of answers, and solutions of the task are single; set "
            "sft.data to rows with the columns prompt, chosen and rejected, or use "
            "sft.loss=denoising"
        )
    for name in OF_DENOISING:
        value, usual = getattr(sft, name), getattr(SftSettings(), name)
        if value != usual:
            raise ValueError(
                f"sft.{name}={text(value)} is of sft.loss=denoising, and sft.loss is vrpo; use "
                f"sft.{name}={text(usual)}"
            )
    if settings.lora.rank is not None:
        _check_adapters(settings)


def _check_adapters(settings: Settings) -> None:
    """Check that the model without its adapters is the start, and that both passes are equal."""
    lora = settings.lora
    for name in ("load", "train_embedding", "train_head"):
        if value := getattr(lora, name):
            fix = "null, and merge an earlier run by model.load=RUN" if name == "load" else "false"
            raise ValueError(
                f"lora.{name}={text(value)} changes the policy before or beyond its adapters, and "
                "the reference of sft.loss=vrpo is the model without them; use "
                f"lora.{name}={fix}"
            )
    if lora.dropout:
        raise ValueError(
            f"lora.dropout={lora.dropout:g} changes the policy between the pass that measures "
            "margins and the one with gradient, and sft.loss=vrpo needs both equal; use "
            "lora.dropout=0"
        )
