"""`agrpo benchmark`: speed of rollouts and updates, against the published computation."""

import argparse
import json
import os
import sys

from agrpo_megatron.benchmark.plan import KINDS, ORDERS, PRESETS, make_plan
from agrpo_megatron.cli.common import add_command, add_overrides, world_size
from agrpo_megatron.config.settings.precision import PRECISIONS
from agrpo_megatron.config.settings.sampling import UNMASKING

# Of the profiler, which otherwise writes to the terminal that it starts and what it did not see.
QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
DETAILS = f"""\
Measure a rollout, a train-step (an update on given rollouts), or an iteration (both).

Weights, prompts and rewards are made up, unless --model names weights. `ours` is what a run of
`agrpo train` computes. `reference`, with --reference, is AGRPO's published computation in plain
torch: every row whole in every step, the logits of all positions, k passes one after another. Both
must first draw the same tokens from the same noise, and have the same gradient; otherwise no speed
is printed. The reference has unmasking={", ".join(ORDERS)}, float32 or bf16, and LLaDA's layers.
"""
EPILOG = """\
  agrpo benchmark rollout --reference                   a tiny model: does it work here?
  agrpo benchmark train-step --layers 6 --hidden 256 --heads 4 --ffn 768 --vocab 16384 --reference
  agrpo benchmark iteration --preset llada-8b/8 --precision bf16 --ceiling --json

docs/benchmark.md explains each figure.
"""


def add_benchmark(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    text = "speed, work and memory of rollouts and updates"
    command = add_command(commands, "benchmark", text, benchmark, details=DETAILS, epilog=EPILOG)
    command.add_argument("kind", choices=KINDS, help="what is measured")
    model = command.add_argument_group("model")
    model.add_argument("--preset", choices=PRESETS, help="a known shape (tiny)")
    model.add_argument("--model", metavar="DIR", help="Hugging Face directory with weights")
    for name in ("layers", "hidden", "heads", "ffn", "vocab"):
        model.add_argument(f"--{name}", type=int, metavar="N", help=f"{name} of the model")
    work = command.add_argument_group("work")
    for name, number, said in (
        ("batch", 8, "rollouts"),
        ("prompt-length", 64, "tokens of each prompt"),
        ("completion-length", 128, "tokens of each completion"),
        ("mc-samples", 8, "denoising steps that an update scores, per rollout"),
    ):
        work.add_argument(
            f"--{name}", type=int, default=number, metavar="N", help=f"{said} ({number})"
        )
    work.add_argument("--block-length", type=int, metavar="N", help="tokens of a block")
    work.add_argument("--denoising-steps", type=int, metavar="N", help="steps of a completion")
    work.add_argument("--unmasking", choices=UNMASKING, help="which positions are fixed next")
    work.add_argument("--temperature", type=float, metavar="T", help="of the draws (1)")
    work.add_argument("--top-k", type=int, metavar="K", help="keep the k likeliest tokens")
    work.add_argument("--top-p", type=float, metavar="P", help="keep the smallest set of this mass")
    work.add_argument(
        "--zero-advantage",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of rollouts without an advantage, which updates of ours leave out (0)",
    )
    how = command.add_argument_group("measurement")
    how.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (1)")
    how.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the model (fp32)")
    how.add_argument("--repeats", type=int, default=5, metavar="N", help="of each timing (5)")
    how.add_argument("--reference", action="store_true", help="compare with the published code")
    how.add_argument("--ceiling", action="store_true", help="measure products of matrices, too")
    how.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    add_overrides(command)


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure and print a table; status 1 if ours and the reference differ."""
    if (ranks := world_size()) > 1:
        raise ValueError(
            f"WORLD_SIZE={ranks}: agrpo benchmark measures one rank; start it without torchrun, "
            "or measure layouts by tools/gpus_check.sh"
        )
    options = {n: v for n, v in vars(arguments).items() if n not in ("kind", "overrides", "run")}
    plan = make_plan(arguments.kind, options, arguments.overrides)
    for name, level in QUIET.items():
        os.environ.setdefault(name, level)
    from rich.console import Console

    from agrpo_megatron.benchmark.equality import Unequal
    from agrpo_megatron.benchmark.report import lines, record, table
    from agrpo_megatron.benchmark.run import measure
    from agrpo_megatron.hardware.kernels import kernels_for

    kernels_for(plan.settings)
    console, notes = Console(), Console(stderr=True, style="dim")
    try:
        found = record(plan, measure(plan, notes.print))
    except Unequal as error:
        print(f"agrpo: not equal to the reference, so not timed: {error}", file=sys.stderr)
        return 1
    console.print(table(found))
    for line in lines(found):
        console.print(line, highlight=False, soft_wrap=True)
    if arguments.json:
        print(json.dumps(found))
    return 0
