"""Print the memory of a rank under every layout of a model, by arithmetic.

    python tools/layouts.py examples/llada_8b/model.yaml --ranks 8
    python tools/layouts.py FILE --ranks 64 --memory 80 --parallel tp4-sp-pp2 precision=bf16

FILE is a settings file or a Hugging Face directory. Weights, gradients and optimizer states are
exact, activations an estimate; leave a tenth of the memory for the rest. A row shows the most
loaded pipeline stage; `host` is the host memory that `optimizer.offload` uses per rank.
Exit status 2 for wrong input.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from agrpo_megatron.config.parallel import layout_name, model_ranks
from agrpo_megatron.config.rules import validate_layout
from agrpo_megatron.config.schema import build, from_text, load
from agrpo_megatron.config.settings import ParallelSettings, Settings
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.scaling.layouts import layouts
from agrpo_megatron.scaling.memory import PARTS, SPARE, worst_rank


def main() -> int:
    """Print one row per layout; returns the exit status."""
    arguments = _arguments()
    try:
        settings = _settings(arguments)
        planned = list(_layouts(settings, arguments.ranks, arguments.parallel))
    except ValueError as error:
        print(f"layouts: error: {error}", file=sys.stderr)
        return 2
    found = [(worst_rank(s, arguments.ranks), s.parallel) for s in planned]
    found.sort(key=lambda pair: (model_ranks(pair[1]), pair[0].total))
    shown = [name for name in (*PARTS, "total", "host") if any(getattr(m, name) for m, _ in found)]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layout", no_wrap=True)
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column(f"{arguments.memory:g} GiB")
    for memory, parallel in found:
        sizes = [f"{getattr(memory, name) / 2**30:.1f}" for name in shown]
        fits = memory.total < SPARE * arguments.memory * 2**30
        table.add_row(
            layout_name(parallel, arguments.ranks), *sizes, "fits" if fits else "[dim]too much[/]"
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


def _layouts(settings: Settings, ranks: int, only: str | None) -> Iterator[Settings]:
    """Yield the settings at each layout that fits model and ranks, or at `only`."""
    if only is not None:
        tree = from_text(ParallelSettings, only, key="--parallel")
        parallel = build(ParallelSettings, tree, "--parallel ")
        validate_layout(settings.model, parallel, world_size=ranks, key="--parallel")
        yield replace(settings, parallel=parallel)
        return
    for parallel in layouts(settings.model, ranks=ranks):
        yield replace(settings, parallel=parallel)


def _settings(arguments: argparse.Namespace) -> Settings:
    path = Path(arguments.file)
    if path.is_dir():
        settings = load(Settings, None, arguments.overrides)
        settings = replace(settings, model=settings_from_hf(path))
    else:
        settings = load(Settings, path, arguments.overrides)
    if settings.model.vocab_size is None:
        raise ValueError("model.vocab_size=null: the table needs it; write model.vocab_size=N")
    return settings


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="settings file or Hugging Face directory")
    parser.add_argument("--ranks", type=int, default=8, help="GPUs, all nodes together (8)")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of each GPU (80)")
    parser.add_argument("--parallel", metavar="LAYOUT", help="this layout only, such as tp4-pp2")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings to change"
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
