"""Lines of checks against golden numbers, and the model they are computed with."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo_megatron.config.parallel import layout_name
from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import build, from_text
from agrpo_megatron.config.settings import ModelSettings, ParallelSettings, Settings
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.megatron.engine import Engine, build_engine
from agrpo_megatron.megatron.parallel import Ranks, world_size
from agrpo_megatron.megatron.weights import export_hf, load_hf


@dataclass(frozen=True)
class Check:
    """One comparison; `error` is what `limit` bounds."""

    name: str
    error: float
    limit: float
    detail: str


def report(checks: Iterable[Check], settings: Settings, ranks: Ranks, *, where: Path) -> int:
    """Print a line per check, with the largest error of all ranks; returns the exit status."""
    failed, total = 0, 0
    for check in checks:
        check = replace(check, error=largest(check.error, ranks.device))
        passed = check.error <= check.limit
        total, failed = total + 1, failed + (not passed)
        if ranks.is_main:
            word = "ok  " if passed else "FAIL"
            bounds = f"{check.error:9.2e} (limit {check.limit:.0e})"
            print(f"{word} {check.name:28s} {bounds}  {check.detail}")
    if ranks.is_main:
        layout = layout_name(settings.parallel, world_size())
        print(f"{where}: {total - failed} of {total} checks passed at {layout}")
    return 1 if failed or not total else 0


def largest(error: float, device: torch.device) -> float:
    """Return the largest error of all ranks; NaN counts as infinite."""
    top = torch.tensor(error, dtype=torch.float64, device=device).nan_to_num(nan=torch.inf)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    return float(top)


def settings_at(
    model: Path, parallel: str, *, token_budget: int, lacking: Mapping[str, Any] | None = None
) -> Settings:
    """Return checked settings for a checkpoint in Hugging Face format, as published code runs it.

    Args:
        lacking: keys that a config.json without them has.

    Raises:
        ValueError: the folder holds no such model, or the layout does not fit.
    """
    parts = from_text(ParallelSettings, parallel, key="--parallel")
    layout = build(ParallelSettings, parts, "--parallel ")
    found = settings_from_hf(model, lacking)
    if found.moe.experts is not None and layout.tensor > 1:
        layout = replace(layout, sequence=True)  # no other layout of experts has tensor parallelism
    settings = Settings(model=found, parallel=layout)
    block = settings.model.block_length or settings.sampling.block_length
    settings = replace(
        settings,
        sampling=replace(settings.sampling, forbid_mask_token=False, block_length=block),
        train=replace(settings.train, token_budget=token_budget),
    )
    validate(settings, world_size())
    return settings


def open_engine(settings: Settings, ranks: Ranks, directory: Path) -> Engine:
    """Build a model for training and load its weights; called by every rank."""
    engine = build_engine(settings, settings.optimizer, iterations=1, ranks=ranks)
    load_hf(engine.network, settings.model, directory)
    return engine


def hf_gradients(engine: Engine, model: ModelSettings) -> dict[str, Tensor]:
    """Return the gradients by their names in Hugging Face's format; called by every rank."""
    named = engine.network.named_parameters()
    gradients = {name: p.main_grad for name, p in named}  # type: ignore[attr-defined]
    return export_hf(gradients, model, engine.ranks)


def parse_arguments(text: str | None, *, directory: str) -> argparse.Namespace:
    """Parse `DIR --parallel LAYOUT`.

    Args:
        text: the docstring of the tool.
        directory: what DIR is.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help=directory)
    parser.add_argument(
        "--parallel", default="tp1", metavar="LAYOUT", help="such as tp2-pp2 or cp2 (default: tp1)"
    )
    return parser.parse_args()
