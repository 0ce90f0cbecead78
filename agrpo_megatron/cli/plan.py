"""`agrpo plan`: layouts of a model on a number of GPUs, their memory, time and cost."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from agrpo_megatron.cli.common import add_command, add_overrides

MOST_ROWS = 10_000
DETAILS = """\
Which layout a model should have on so many GPUs: memory, seconds of an iteration, and cost of each
legal layout, by arithmetic. Nothing is run, and no weights are needed.

MODEL is a preset (llada-8b, dream-7b, sdar-8b, sdar-30b-a3b, nemotron-14b, llada2-mini,
llada2-flash, 13b, 34b, 70b), a Hugging Face directory or its config.json, or a settings file.
"""
EPILOG = """\
examples:
  agrpo plan llada2-flash --gpus 128xH100
  agrpo plan 70b --gpus 256xH100 --completion-length 1024 --price 2.5 --watts 1000
  agrpo plan models/LLaDA-8B-Instruct --gpus 8xA100 lora.rank=64
  agrpo plan llada2-flash --gpus 128xH100 --experts 0.7 --links 0.6 --latency 30 --network 25
  agrpo plan llada-8b --gpus 32xH200 --output plan.yaml && agrpo config plan.yaml --ranks 32

how to read it:
  Weights, gradients and optimizer are exact; activations are an estimate; a tenth of each GPU is
  left for buffers. Seconds are a roofline: products at a share of the published peak (--mfu), reads
  of weights and cached keys at the memory's bandwidth, messages at the rates of the links. Every
  assumption is printed and has an option that replaces it. `first` says why the first layout is
  first, `with` which change would put another one there, `too large` and `refused` why others are
  not in the table.

from assumptions to measurements:
  agrpo benchmark iteration --preset llada-8b/8 --precision bf16 --json > speed.json
  agrpo plan llada-8b --gpus 8xH100 --measured speed.json
  agrpo plan examples/tiny.yaml --gpus 1xCPU --measured runs/a --measured runs/b

  A run or a benchmark gives a rate. Several runs of different sizes also give what operations
  other than products take, and predict other sizes better.
"""


def add_plan(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    text = "layouts of a model on GPUs: memory, time, cost"
    command = add_command(commands, "plan", text, plan, details=DETAILS, epilog=EPILOG)
    command.add_argument("model", metavar="MODEL", help="preset, Hugging Face directory, or file")
    command.add_argument(
        "--gpus", required=True, metavar="NxGPU", help="such as 128xH100; A100, H100, H200, B200"
    )
    work = command.add_argument_group("work")
    work.add_argument("--prompt-length", type=int, metavar="N", help="tokens (the task's, or 256)")
    work.add_argument("--completion-length", type=int, metavar="N", help="tokens (the settings')")
    machine = command.add_argument_group("machine, in place of published figures")
    for name, unit, said in (
        ("memory", "GIB", "memory of a GPU"),
        ("peak", "TFLOPS", "dense peak of matrix products"),
        ("bandwidth", "GBS", "memory bandwidth"),
        ("nvlink", "GBS", "NVLink of a GPU, one direction"),
        ("network", "GBS", "network of a GPU, one direction"),
        ("mfu", "SHARE", "share of the peak that products reach (bf16 0.55, fp8 0.42)"),
        ("experts", "SHARE", "share of --mfu that products of experts reach (bf16 0.5, fp8 0.25)"),
        ("links", "SHARE", "share of NVLink and network that collectives reach (0.8)"),
        ("latency", "US", "microseconds of a message without data (15)"),
        ("launch", "US", "microseconds of a layer at least, in each direction (60)"),
        ("overlap", "SHARE", "share of the exchange of gradients that computation hides (0)"),
    ):
        machine.add_argument(f"--{name}", type=float, metavar=unit, help=said)
    machine.add_argument(
        "--measured",
        type=Path,
        action="append",
        metavar="FILE",
        help="speed of this run, or of `agrpo benchmark --json`, in place of all rates; several "
        "runs: give it several times",
    )
    machine.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of a node (8)")
    result = command.add_argument_group("result")
    result.add_argument("--layout", metavar="LAYOUT", help="plan this one alone, such as tp4-pp2")
    result.add_argument("--rows", type=int, default=10, metavar="N", help="layouts shown (10)")
    result.add_argument("--price", type=float, metavar="PRICE", help="of a GPU-hour")
    result.add_argument("--watts", type=float, metavar="W", help="of a GPU with its machine")
    result.add_argument("--output", type=Path, metavar="FILE", help="write the first as settings")
    result.add_argument("--json", action="store_true", help="print all layouts as JSON instead")
    add_overrides(command)


def plan(arguments: argparse.Namespace) -> int:
    """Print the layouts that fit; status 1 if none does."""
    from rich.console import Console

    from agrpo_megatron.planning.cluster import Given, assumption, read_cluster, read_ranks
    from agrpo_megatron.planning.output import launch_command, settings_text, write_settings
    from agrpo_megatron.planning.presets import open_model, read_layout
    from agrpo_megatron.planning.ranking import rank_layouts
    from agrpo_megatron.planning.report import Prices, as_json, lines_after, lines_before, table

    given = Given(**{name: getattr(arguments, name) for name in Given.__annotations__})
    prices = Prices(arguments.price, arguments.watts)
    prices.check()
    if not 1 <= arguments.rows <= MOST_ROWS:
        raise ValueError(f"--rows={arguments.rows} must be from 1 to {MOST_ROWS}; use 10")
    model = open_model(
        arguments.model,
        arguments.overrides,
        ranks=read_ranks(arguments.gpus),
        prompt_length=arguments.prompt_length,
        completion_length=arguments.completion_length,
    )
    cluster = read_cluster(arguments.gpus, model.settings.precision, given)
    if arguments.measured is not None:
        from agrpo_megatron.planning.measured import read_measured

        cluster = cluster.with_measured(read_measured(arguments.measured, cluster))
    only = None if arguments.layout is None else read_layout(arguments.layout)
    ranking = rank_layouts(model, cluster, only=only)
    assumed = assumption(cluster, model.settings.precision)
    text = ""
    if ranking.fitting and arguments.output is not None:
        text = settings_text(ranking.fitting[0], cluster, command=_command())
        write_settings(arguments.output, text)
    if arguments.json:
        print(json.dumps(as_json(ranking, assumed, prices)))
        return 0 if ranking.fitting else 1
    console = Console(width=None if sys.stdout.isatty() else 200)
    for line in lines_before(ranking, assumed):
        console.print(line, highlight=False, soft_wrap=True)
    if ranking.fitting:
        console.print(table(ranking, rows=arguments.rows))
    for line in lines_after(ranking, prices):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if ranking.fitting:
        if text:
            console.print(f"written   {arguments.output}", highlight=False, soft_wrap=True)
        file = str(arguments.output) if text else "FILE (written with --output FILE)"
        console.print(f"launch    {launch_command(file, cluster)}", highlight=False, soft_wrap=True)
    return 0 if ranking.fitting else 1


def _command() -> str:
    return shlex.join(["agrpo", *sys.argv[1:]])
