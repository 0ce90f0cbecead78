"""Rules of the supervised phase."""

from collections.abc import Mapping

from agrpo_megatron.config.annealing import validate_schedule
from agrpo_megatron.config.rules.preferences import validate_preferences
from agrpo_megatron.config.schema import written
from agrpo_megatron.config.settings import Settings, SftSettings
from agrpo_megatron.config.values import text

OF_DATA = ("columns", "chat", "turns", "padding", "row_tokens", "long_rows", "eval_data")
OF_DATA += ("eval_fraction", "eval_interval", "format", "document_mask")
OF_REPLIES = ("chat", "turns", "padding", "long_rows", "eval_fraction")


def validate_supervised(settings: Settings) -> None:
    """Check that the settings of the supervised phase fit each other.

    Raises:
        ValueError: the first rule broken, with key, value, rule and fix.
    """
    sft = settings.sft
    validate_preferences(settings)
    validate_schedule(settings)
    if sft.epochs == 0:
        raise ValueError("sft.epochs=0 trains nothing; use for example 1, or null")
    if sft.data is None:
        _check_solutions(sft)
        return
    if not sft.is_on and "iterations" not in written(sft):
        raise ValueError(
            f"sft.data={sft.data} is for a supervised phase, and sft.iterations=0 has none; set "
            "for example sft.epochs=1, or write sft.iterations=0 to skip the phase"
        )
    if sft.problems is not None:
        raise ValueError(
            f"sft.problems={sft.problems} selects solutions of the task, and sft.data is set; use "
            "sft.problems=null"
        )
    _check_held_out(sft)
    if sft.format == "texts":
        _check_texts(sft)
    elif not sft.document_mask:
        raise ValueError(
            f"sft.document_mask=false is for raw texts, and sft.format={sft.format}; use true, or "
            "sft.format=texts"
        )
    most = settings.model.max_sequence_length
    if settings.model.is_known and sft.row_tokens is not None and sft.row_tokens > most:
        raise ValueError(
            f"sft.row_tokens={sft.row_tokens} is over model.max_sequence_length={most}; use at "
            f"most {most}"
        )
    if sft.padding == "none" and settings.model.has_blocks and sft.format == "replies":
        raise ValueError(
            f"sft.padding=none ends a row within a block, and a model with model.attention="
            f"{settings.model.attention} generates whole blocks; use block"
        )


def _check_solutions(sft: SftSettings) -> None:
    """Refuse settings of rows where the phase learns from the task's solutions."""
    for name in OF_DATA:
        value, default = getattr(sft, name), getattr(SftSettings(), name)
        if sft.is_on and value != default:
            raise ValueError(
                f"sft.{name}={text(value)} is for rows of sft.data, which is null; set sft.data, "
                f"or use sft.{name}={text(default)}"
            )


def _check_texts(sft: SftSettings) -> None:
    """Refuse settings of replies where rows are cut from raw texts."""
    if sft.loss != "denoising":
        raise ValueError(
            f"sft.loss={sft.loss} compares replies, and sft.format=texts has none; use "
            "sft.loss=denoising"
        )
    for name in OF_REPLIES:
        value, default = getattr(sft, name), getattr(SftSettings(), name)
        is_own = name == "padding" and value == "none"  # what rows of texts have
        if value != default and not is_own:
            raise ValueError(
                f"sft.{name}={text(value)} is for replies, and sft.format=texts has none; use "
                f"sft.{name}={text(default)}"
            )
    parts = sft.data.items() if isinstance(sft.data, Mapping) else ()
    columns = [("sft.columns", sft.columns)]
    for label, part in parts:
        if isinstance(part, Mapping) and part.get("chat") is not None:
            raise ValueError(
                f"sft.data.{label}.chat={text(part['chat'])} is for replies, and sft.format=texts "
                "has none; leave it out"
            )
        if isinstance(part, Mapping):
            columns.append((f"sft.data.{label}.columns", part.get("columns") or {}))
    for key, named in columns:
        for role in named:
            if role != "text":
                raise ValueError(
                    f"{key}.{role} is of replies, and sft.format=texts has one column; use "
                    "{text: NAME}"
                )


def _check_held_out(sft: SftSettings) -> None:
    if sft.eval_data is not None and sft.eval_fraction:
        raise ValueError(
            f"sft.eval_data={sft.eval_data} and sft.eval_fraction={sft.eval_fraction:g} both name "
            "held-out rows; use one of them"
        )
    if sft.eval_interval and sft.eval_data is None and not sft.eval_fraction:
        raise ValueError(
            f"sft.eval_interval={sft.eval_interval} needs held-out rows; set sft.eval_data to a "
            "file, or sft.eval_fraction, for example to 0.05"
        )
