"""`agrpo launch`: check a run, show its job, and submit it to SLURM; also sweeps."""

import argparse

from agrpo_megatron.cli.common import (
    add_assumed,
    add_command,
    add_overrides,
    add_run,
    assumed,
    run_file,
)
from agrpo_megatron.resilience.exit_status import LAUNCH_FOLDER

EXAMPLES = """\
what it does:
  It loads and checks the settings as `agrpo train` will, at the ranks of the job, asks the cluster
  whether it can run such a job, shows run directory, layout, memory and the exact sbatch command,
  and submits it, unless a check fails. Before its time limit the job gets a signal, saves, and
  queues itself again; ranks and nodes that fail are replaced; each time the run resumes from its
  last checkpoint. `agrpo config --section launch` explains the job's settings.

a run on 4 nodes of 8 GPUs:
  agrpo launch examples/llada_8b/gsm8k_4_nodes.yaml --nodes 4 --dry-run
  agrpo launch examples/llada_8b/gsm8k_4_nodes.yaml --nodes 4 launch.time=04:00:00

on CPUs, two ranks on each of two nodes:
  agrpo launch examples/tiny.yaml --nodes 2 launch.gpus_per_node=0 launch.ranks_per_node=2

--dry-run prints a script for bash: notes as comments, then the commands. Run it, or keep it.

where the logs are (ID is the job's number, RUN its run directory):
  squeue -j ID                  whether it waits or runs
  RUN/launch/ID.log             the log of the job: checks, attempts, exit status
  RUN/launch/ID/latest/         its newest attempt, a file for each rank

how to stop:
  scancel ID                    for good; checkpoints stay
  scancel --signal=USR1 ID      save, and wait in the queue again

how to resume: give the same command again; it shows the iteration the run resumes from. A finished
run is refused; --restart moves it away and starts again.

a sweep, a run for each combination, in folders 00, 01, ... of the run directory:
  agrpo launch examples/tiny.yaml --nodes 1 launch.gpus_per_node=0 run.dir=runs/sweep \\
      --sweep 'optimizer.learning_rate=[2e-4, 4e-4]' 'run.seed=[0, 1]'
  agrpo launch examples/tiny.yaml --nodes 1 launch.gpus_per_node=0 run.dir=runs/sweep \\
      --sweep examples/sweep.yaml

  All members are checked before any is submitted. A job array runs them, and a job after it
  writes summary.md: best member first, with failures and their causes; `agrpo report RUN` writes it
  sooner. The same command again submits the unfinished members.
"""


def add_launch(commands: argparse._SubParsersAction) -> None:
    """Add `launch`."""
    text = "check a run, show its SLURM job, and submit it; also sweeps"
    command = add_command(commands, "launch", text, launch, epilog=EXAMPLES)
    add_run(command)
    command.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    command.add_argument("--dry-run", action="store_true", help="show the job, submit nothing")
    command.add_argument(
        "--sweep",
        nargs="+",
        metavar="KEY=[VALUE,...]",
        help="settings in which members of a sweep differ, or YAML files of them",
    )
    add_assumed(command)
    add_overrides(command)


def launch(arguments: argparse.Namespace) -> int:
    """Check a run or a sweep, print the script that submits it, and run that script."""
    from agrpo_megatron.launch.submit import check_job, launch_run, launch_sweep, submit

    file, overrides = run_file(arguments.file, arguments.overrides)
    choices = {"nodes": arguments.nodes, "is_restart": arguments.restart}
    choices["assumed"] = assumed(arguments)
    if arguments.sweep is None:
        launched = launch_run(file, overrides, **choices)
    else:
        launched = launch_sweep(file, overrides, arguments.sweep, **choices)
    script = launched.script(check_job(launched, is_dry=arguments.dry_run))
    print(script, end="", flush=True)
    if arguments.dry_run:
        return 0
    number, *table = submit(script)
    folder = launched.directory / LAUNCH_FOLDER
    print(f"\njob     {number}" + (f", and {table[0]} for the table" if table else ""))
    print(f"wait    squeue -j {number}")
    if table:
        print(f"logs    {folder}/{number}_*.log, {launched.directory}/NN/launch/")
        print(f"table   {launched.directory}/summary.md")
    else:
        print(f"logs    {folder}/{number}.log, {folder}/{number}/latest/")
    print(f"stop    scancel {number}                for good; what was saved stays")
    print(f"pause   scancel --signal=USR1 {number}  save, and wait in the queue again")
    return 0
