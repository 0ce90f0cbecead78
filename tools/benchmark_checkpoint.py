"""Measure what a checkpoint costs: a synchronous save, and how long a background one blocks.

    python tools/benchmark_checkpoint.py --megabytes 500
    torchrun --standalone --nproc-per-node 2 tools/benchmark_checkpoint.py --parallel tp2

A random model in float32 with Adam's moments (three times its bytes are written). `blocked` is the
time that the training loop waits; the background save then continues in parallel.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from agrpo_megatron.checkpoint.optimizer_state import sharded_optimizer
from agrpo_megatron.checkpoint.saving import Saver
from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.engine import Engine, build_engine
from agrpo_megatron.megatron.parallel import start_ranks, stop_ranks, world_size
from agrpo_megatron.megatron.weights import initialise
from agrpo_megatron.runs.progress import Progress

WIDTH = 1024


def main() -> int:
    """Save a few times in both ways; returns the exit status."""
    arguments = _arguments()
    layer = 4 * (4 * WIDTH**2 + 9 * WIDTH**2)
    overrides = [
        f"model.num_layers={max(1, round(arguments.megabytes * 1e6 / layer))}",
        f"model.hidden_size={WIDTH}",
        f"model.ffn_hidden_size={3 * WIDTH}",
        "model.vocab_size=512",
        "model.mask_token_id=511",
        f"parallel={arguments.parallel}",
    ]
    try:
        settings = load(Settings, None, overrides)
        validate(settings, world_size())
    except ValueError as error:
        print(f"benchmark_checkpoint: error: {error}", file=sys.stderr)
        return 2
    ranks = start_ranks(settings)
    engine = build_engine(settings, settings.optimizer, iterations=1, ranks=ranks)
    initialise(engine.network, settings.model, 0)
    model = engine.network.chunks[0].sharded_state_dict()
    sharded_optimizer(engine, {"model": model}, is_loading=True)  # allocates Adam's moments
    size = sum(p.numel() * p.element_size() for _, p in engine.network.named_parameters())
    folder = Path(arguments.dir or tempfile.mkdtemp())
    whole = [_save(engine, folder / "sync", arguments.repeat, is_async=False)]
    whole.append(_save(engine, folder / "background", arguments.repeat, is_async=True))
    if ranks.is_main:
        print(f"weights of rank 0: {size / 1e6:.0f} MB; median of {arguments.repeat} saves")
        for name, (blocked, total) in zip(("synchronous", "background"), whole, strict=True):
            print(f"{name:>12}  blocked {blocked:6.2f} s, whole {total:6.2f} s")
        print(f"the background save blocks {whole[1][0] / whole[0][0]:.1%} of a synchronous one")
        shutil.rmtree(folder)
    stop_ranks()
    return 0


def _save(engine: Engine, folder: Path, repeat: int, *, is_async: bool) -> tuple[float, float]:
    """Return the median seconds that a save blocks, and that it takes in all."""
    saver = Saver(folder, engine, keep=1, is_async=is_async, files=None)
    blocked, whole = [], []
    for number in range(repeat + 1):  # the first one warms up
        started = time.perf_counter()
        saver.save(Progress("rl", number, {}))
        blocked.append(time.perf_counter() - started)
        saver.finish()
        whole.append(time.perf_counter() - started)
    return statistics.median(blocked[1:]), statistics.median(whole[1:])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=500.0, help="of weights, about (500)")
    parser.add_argument("--repeat", type=int, default=3, help="saves of each kind (3)")
    parser.add_argument("--parallel", default="tp1", metavar="LAYOUT", help="such as tp2 (tp1)")
    parser.add_argument("--dir", help="where to write; default: a temporary folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
