"""`agrpo lm-eval`: lm-evaluation-harness on a trained model."""

import argparse
import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agrpo_megatron.cli.common import TARGET, Target, add_command, is_main, world_size
from agrpo_megatron.evaluation.target import find_target

if TYPE_CHECKING:
    from agrpo_megatron.serving.model import Model

LM_EVAL = """\
examples:
  agrpo lm-eval runs/tiny --tasks my_task --include_path my_tasks --output_path results
  agrpo lm-eval models/LLaDA-8B-Instruct evaluation.denoising_steps=256 --tasks gsm8k \\
      --apply_chat_template --num_fewshot 4 --output_path results --log_samples
  agrpo lm-eval runs/a --checkpoint best --mc-samples 256 --tasks arc_challenge --limit 100
  torchrun --nproc-per-node 8 -m agrpo_megatron lm-eval models/LLaDA-8B-Base --tasks mmlu

Settings stand directly after TARGET; all other arguments are lm-eval's own
(`python -m lm_eval run --help`), but for --model and --model_args. docs/evaluation.md explains
how completions and likelihoods are computed.
"""


def add_serving(commands: argparse._SubParsersAction) -> None:
    """Add the commands that use a model without its task."""
    text = "lm-evaluation-harness on a trained model"
    command = add_command(commands, "lm-eval", text, lm_eval, epilog=LM_EVAL)
    command.add_argument("target", metavar="TARGET", help=TARGET)
    command.add_argument(
        "rest",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="settings; --checkpoint NAME, --settings FILE, --mc-samples N (128), --masks "
        "counts|coupled_counts; arguments of lm-eval",
    )


def lm_eval(arguments: argparse.Namespace) -> int:
    """Run lm-evaluation-harness on a model."""
    _require("lm_eval", extra="lm-eval")
    leading = itertools.takewhile(lambda word: not word.startswith("-"), arguments.rest)
    overrides = list(leading)
    own = argparse.ArgumentParser(prog="agrpo lm-eval", add_help=False, allow_abbrev=False)
    own.add_argument("--checkpoint")
    own.add_argument("--settings")
    own.add_argument("--mc-samples", type=int, default=128)
    own.add_argument("--masks", default="counts")
    chosen, rest = own.parse_known_args(arguments.rest[len(overrides) :])
    for word in rest:
        if word.partition("=")[0] in ("--model", "-M", "--model_args", "-a"):
            raise ValueError(f"{word}: the model is {arguments.target}; leave it out")
    target = find_target(
        Path(arguments.target),
        checkpoint=chosen.checkpoint,
        file=chosen.settings,
        overrides=overrides,
    )
    from agrpo_megatron.serving.lm_eval import AgrpoLM, check_masks, run_harness

    check_masks(chosen.mc_samples, chosen.masks)
    with _led(target) as model:
        if model is not None:
            AgrpoLM.opened = model
            options = {"mc_samples": chosen.mc_samples, "masks": chosen.masks}
            if target.checkpoint is not None:
                options["checkpoint"] = target.name
            if overrides:
                options["settings"] = ";".join(overrides)
            run_harness(rest, arguments.target, options)
    return 0


@contextmanager
def _led(target: Target) -> "Iterator[Model | None]":
    """Yield the open model on the main rank; other ranks do its jobs, and then get None."""
    from agrpo_megatron.hardware.kernels import kernels_for
    from agrpo_megatron.resilience.failure import ending_together
    from agrpo_megatron.serving.model import follow, leading, open_model, resolved_model

    resolved = resolved_model(target.settings, world_size=world_size())
    kernels_for(resolved.settings)
    with ending_together(), open_model(resolved, target.checkpoint) as model:
        if is_main():
            with leading(model):
                yield model
        else:
            follow(model)
            yield None


def _require(module: str, *, extra: str) -> None:
    """Refuse a command whose optional packages are missing."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"the package {module} is not installed; install agrpo-megatron[{extra}]")
