"""`agrpo convert`: checkpoints between Hugging Face and Megatron, and their comparison."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from agrpo_megatron.cli.common import add_command

EPILOG = """\
examples:
  agrpo convert to-megatron LLaDA-8B-Instruct llada-8b-megatron
  agrpo convert to-hf runs/llada exported             the run's latest checkpoint
  agrpo convert to-hf runs/llada exported --checkpoint best --dtype bf16
  agrpo convert to-hf runs/llada exported --own-code  with a modelling file for new transformers
  agrpo convert to-hf runs/lora merged                adapters, merged into their base
  agrpo convert to-peft runs/lora adapters            the adapters alone, for the PEFT library
  agrpo convert verify LLaDA-8B-Instruct llada-8b-megatron
"""
SHOWN = 5  # tensors that differ most


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add the command with its sub-commands."""
    parser = add_command(
        commands,
        "convert",
        "checkpoints from and to Hugging Face",
        convert,
        details="Convert checkpoints from and to Hugging Face's format, as a stream: memory "
        "does not grow with the model, and an interrupted conversion resumes when it is started "
        "again.",
        epilog=EPILOG,
    )
    ways = parser.add_subparsers(dest="way", metavar="WAY", required=True)
    for name, text in (
        ("to-megatron", "Hugging Face directory to a Megatron checkpoint"),
        ("to-hf", "Megatron checkpoint, or a run, to a Hugging Face directory"),
        ("to-peft", "adapters of a checkpoint, or a run, to PEFT's format"),
    ):
        way = add_command(ways, name, text, convert)
        way.add_argument("source", type=Path, metavar="SOURCE")
        way.add_argument("target", type=Path, metavar="TARGET", help="must not exist yet")
        way.add_argument(
            "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights; default: as stored"
        )
        if name != "to-megatron":
            way.add_argument("--checkpoint", metavar="NAME", help="of a run: latest, best, a name")
        if name == "to-hf":
            way.add_argument(
                "--base", type=Path, metavar="DIR", help="of adapters, if it has been moved"
            )
            way.add_argument(
                "--own-code",
                action="store_true",
                help="write agrpo's modelling file in place of the model's own, for transformers "
                "4.46 and newer: LLaDA, Dream, SDAR, LLaDA-MoE and LLaDA2",
            )
    text = "compare tensors and logits of two checkpoints, of either format"
    way = add_command(ways, "verify", text, verify)
    way.add_argument("first", type=Path, metavar="A")
    way.add_argument("second", type=Path, metavar="B")
    way.add_argument("--no-logits", action="store_true", help="tensors only: needs less memory")
    way.add_argument("--tolerance", type=float, default=0.0, help="allowed relative difference (0)")


def convert(arguments: argparse.Namespace) -> int:
    """Convert a Hugging Face directory, or a Megatron checkpoint."""
    source, way = arguments.source, arguments.way
    if way != "to-megatron":
        source = _checkpoint(source, arguments.checkpoint)
        _refuse_hugging_face(source, way)
    from agrpo_megatron.checkpoint import convert as ways
    from agrpo_megatron.runs.files import check_folder, naming_full_disk

    check_folder(arguments.target.parent, key="TARGET's folder")
    write = {
        "to-megatron": ways.to_megatron_checkpoint,
        "to-hf": partial(
            ways.to_hf_directory,
            base=getattr(arguments, "base", None),
            own_code=getattr(arguments, "own_code", False),
        ),
        "to-peft": ways.to_peft_directory,
    }[way]
    with naming_full_disk(arguments.target.parent), _bar("converting") as progress:
        loader = write(source, arguments.target, dtype=arguments.dtype, progress=progress)
    print(arguments.target)
    if loader:
        print(f"loads with: {loader}", file=sys.stderr)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare two checkpoints; returns 1 if they differ."""
    from rich.console import Console
    from rich.table import Table

    from agrpo_megatron.checkpoint.verify import compare_logits, compare_tensors

    first, second = (_checkpoint(path, None) for path in (arguments.first, arguments.second))
    with _bar("comparing") as progress:
        found = list(compare_tensors(first, second, progress))
    worst = sorted(found, key=lambda difference: -difference.relative)[:SHOWN]
    if not arguments.no_logits:
        worst.append(compare_logits(first, second))
    table = Table("tensor", "dtypes", "largest difference", "relative", box=None)
    for difference in worst:
        numbers = f"{difference.largest:.3g}", f"{difference.relative:.3g}"
        table.add_row(difference.name, " ".join(sorted(set(difference.dtypes))), *numbers)
    Console(soft_wrap=True).print(table)
    equal = sum(difference.largest == 0 for difference in found)
    passed = all(d.relative <= arguments.tolerance for d in (*found, *worst))
    print(f"{equal} of {len(found)} tensors are identical: {'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


def _checkpoint(path: Path, name: str | None) -> Path:
    """Return the checkpoint of a run directory, or the path itself."""
    from agrpo_megatron.runs.progress import CHECKPOINTS, checkpoint_path

    if (path / CHECKPOINTS).is_dir():
        return checkpoint_path(path, name)
    if name is not None:
        raise ValueError(f"--checkpoint {name}: {path} is not a run directory")
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give a checkpoint or a run directory")
    return path


def _refuse_hugging_face(source: Path, way: str) -> None:
    from agrpo_megatron.checkpoint.weights import is_megatron
    from agrpo_megatron.families.config_json import CONFIG

    if (source / CONFIG).is_file() and not is_megatron(source):
        raise ValueError(
            f"{source} is a Hugging Face directory; {way} reads a run or a Megatron checkpoint. "
            "Load it as it is, or use to-megatron first to change its dtype or its code"
        )


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Yield the update function of a progress bar: bytes done, bytes in all."""
    from rich import progress
    from rich.console import Console

    columns = text, progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn()
    remaining, console = progress.TimeRemainingColumn(), Console(stderr=True)
    with progress.Progress(*columns, remaining, console=console) as bar:
        task = bar.add_task(text, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
