"""The `agrpo` command: thin sub-commands over the library.

Heavy imports happen inside the sub-commands, after the settings are checked, so that `--help`,
`config` and wrong input respond at once.
"""

import argparse
import gc
import os
import sys
from pathlib import Path

from agrpo_megatron import __version__
from agrpo_megatron.cli.benchmark import add_benchmark
from agrpo_megatron.cli.common import (
    add_command,
    add_overrides,
    add_run,
    add_target,
    all_overrides,
    is_main,
    open_target,
    run_file,
    world_size,
)
from agrpo_megatron.cli.config import add_config
from agrpo_megatron.cli.convert import add_convert
from agrpo_megatron.cli.doctor import add_doctor
from agrpo_megatron.cli.evaluate import add_evaluate, add_report
from agrpo_megatron.cli.launch import add_launch
from agrpo_megatron.cli.plan import add_plan
from agrpo_megatron.cli.prefetch import add_prefetch
from agrpo_megatron.cli.serving import add_serving
from agrpo_megatron.cli.variance import add_variance
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.resilience import exit_status
from agrpo_megatron.runs.files import naming_full_disk

# Imports of torch and Megatron-Core make a million objects and no garbage; by its own thresholds
# Python would look through them two thousand times, a fifth of the seconds of a start.
GARBAGE = (100_000, 50, 100)
INTERRUPTED, UNREAD = 130, 141  # exit status after SIGINT and SIGPIPE, as in a shell
EPILOG = """\
a first run:
  agrpo train examples/tiny.yaml            train from nothing on the CPU, in minutes
  agrpo sample runs/tiny --trace            see completions and their unmasking order
  agrpo report runs/tiny                    figures and an HTML page

several ranks:
  torchrun --nproc-per-node 2 -m agrpo_megatron train examples/tiny.yaml parallel.tensor=2

a SLURM cluster:
  agrpo launch FILE --nodes 4 --dry-run     the job, checked and shown; without --dry-run submitted

`agrpo COMMAND --help` explains a command, `agrpo config` every setting.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit status: 2 for wrong input."""
    gc.set_threshold(*GARBAGE)
    parser = _parser()
    # argparse does not accept overrides after an option: `a.b=1 --restart c.d=2`.
    arguments, rest = parser.parse_known_args(argv)
    strange = [r for r in rest if "=" not in r or r.startswith("-")]
    if strange or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"not understood: {' '.join(strange or rest)}")
    if hasattr(arguments, "overrides"):
        arguments.overrides = all_overrides(arguments, rest)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except ValueError as error:
        if os.environ.get("AGRPO_TRACEBACK"):
            raise
        said = " ".join(str(error).splitlines())  # values are shown as they are
        exit_status.report_refusal(said)
        if is_main():
            print(
                f"agrpo: error: {said}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr
            )
            exit_status.report_outcome("refused", said)
        elif not exit_status.main_rank_reported("refused"):  # only this rank fails: not status 0
            print(f"agrpo: rank {os.environ['RANK']}: error: {said}", file=sys.stderr)
            return 2
        return exit_status.launcher_status(2)
    except (BrokenPipeError, SystemExit) as error:
        if not _is_unread(error):
            raise
        return UNREAD
    except KeyboardInterrupt as error:
        print(": ".join(filter(None, ("agrpo: interrupted", str(error)))), file=sys.stderr)
        return INTERRUPTED


def train(arguments: argparse.Namespace) -> int:
    """Run or resume training, then write the report and print the result."""
    phases = arguments.phases
    settings = load(Settings, *run_file(arguments.file, arguments.overrides))
    from agrpo_megatron.hardware.kernels import kernels_for
    from agrpo_megatron.runs import directory
    from agrpo_megatron.runs.early_stopping import still_stopped
    from agrpo_megatron.training.passed import check_start

    restart = arguments.restart
    resolved = directory.resolve_run(
        settings, world_size=world_size(), is_restart=restart, phases=phases
    )
    settings, run_dir = resolved.settings, Path(resolved.settings.run.dir)
    # After --restart there is no progress, though another rank may still be moving the old run.
    done = None if restart else directory.progress(settings)
    is_finished = directory.is_finished(settings, done)
    if not is_finished:
        kernels_for(settings, phases=phases)  # check this machine first
        check_start(resolved, world_size())
    if restart and is_main() and (moved := directory.move_away(run_dir)):
        print(f"the earlier run is now {moved}")
    if is_finished:
        if is_main():
            _show_finished(run_dir, still_stopped(done, settings.train) if done else None)
        return _end("finished", "", 0)
    from agrpo_megatron.reports.terminal import LiveView
    from agrpo_megatron.resilience.attempts import Stuck
    from agrpo_megatron.resilience.failure import ending_together
    from agrpo_megatron.resilience.stop import CTRL_C
    from agrpo_megatron.training.run import train as run

    sft_iterations, finished = settings.sft.iterations, (0, 0)
    if done is not None:
        is_sft = done.phase == "sft"
        finished = (done.iteration, 0) if is_sft else (sft_iterations, done.iteration)
    view = LiveView(
        sft_iterations=sft_iterations if "sft" in phases else 0,
        rl_iterations=settings.train.iterations if "rl" in phases else 0,
        live=settings.logging.live,
        is_main=is_main(),
        start=finished,
    )
    stopped, stuck = None, None
    with ending_together(view), naming_full_disk(run_dir):
        try:
            stopped = run(resolved, view, phases=phases)
        except Stuck as error:
            stuck = str(error)
    if stuck is not None:
        return _end("stuck", stuck, exit_status.STUCK)
    if stopped is not None:
        reason = f"{stopped}; saved: run the same command, or `agrpo train {run_dir}`, to resume"
        is_ctrl_c = stopped == CTRL_C
        return _end("requeue", reason, INTERRUPTED if is_ctrl_c else exit_status.REQUEUE)
    with naming_full_disk(run_dir):
        if is_main():
            _conclude(run_dir)
    return _end("finished", "", 0)


def _conclude(run_dir: Path) -> None:
    """Write the report and print the result; imports matplotlib, which no other rank needs."""
    from agrpo_megatron.reports.summary import conclude

    conclude(run_dir)


def _show_finished(run_dir: Path, reason: str | None) -> None:
    """Print that a run is finished, how to continue it, and its results.

    Args:
        reason: why it ended early; None: all its iterations are done.
    """
    why = "" if reason is None else f" ({reason})"
    key = "more train.iterations" if reason is None else "another limit"
    print(f"{run_dir} is finished{why}; add --restart to run it again, or {key} to continue it\n")
    _conclude(run_dir)


def _end(outcome: str, reason: str, status: int) -> int:
    """Report how training ended, to the user and the job's script; returns the exit status."""
    if is_main():
        if reason:
            said = "stopped" if outcome == "requeue" else outcome  # jobs alone have queues
            print(f"agrpo: {said}: {reason}", file=sys.stderr)
        exit_status.report_outcome(outcome, reason)
    return exit_status.launcher_status(status)


def sample(arguments: argparse.Namespace) -> int:
    """Print completions of held-out problems or of a prompt."""
    from rich.console import Console
    from rich.text import Text

    target = open_target(arguments)
    from agrpo_megatron.evaluation.open import complete, opened
    from agrpo_megatron.hardware.kernels import kernels_for
    from agrpo_megatron.resilience.failure import ending_together
    from agrpo_megatron.rollout.generate import grading_calls
    from agrpo_megatron.runs.resolve import check_prompt, resolve
    from agrpo_megatron.serving.chat import show_trace
    from agrpo_megatron.tasks.base import task_prompts
    from agrpo_megatron.text.chat import shown_prompt

    if arguments.number < 1:
        raise ValueError(f"--number={arguments.number} must be at least 1; use for example 3")
    given = [] if arguments.prompt is None else [arguments.prompt]
    needs = () if given else ("eval",)
    resolved = resolve(target.settings, world_size=world_size(), needs=needs)
    notes = check_prompt(resolved, given[0]) if given else resolved.task.notes
    kernels_for(resolved.settings)
    console, tokenizer, task = Console(), resolved.tokenizer, resolved.task
    problems = [] if given else task.problems("eval")[: arguments.number]
    prompts = given or task_prompts(task, problems, split="eval")
    with ending_together(), opened(resolved, target.checkpoint) as (session, network):
        trajectory = complete(session.run, network, prompts)
        tokens = trajectory.tokens[: len(problems)]
        calls = grading_calls(session.run, problems, tokens, split="eval")
        rewards = session.run.grader.grade(calls)
    if not is_main():
        return 0
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for row, prompt in enumerate(prompts):
        ids = trajectory.tokens[row].tolist()
        console.print(Text.assemble(("prompt      ", "dim"), shown_prompt(prompt)))
        console.print(Text.assemble(("completion  ", "dim"), tokenizer.decode(ids)))
        if problems:
            reward = rewards[row]
            word = ("correct", "green") if reward.correct else ("wrong", "red")
            console.print(Text.assemble(("reward      ", "dim"), f"{reward.score:g} ", word))
        if arguments.trace:
            show_trace(tokenizer, trajectory, row, console)
        console.print()
    return 0


def _is_unread(error: BaseException) -> bool:
    """Whether the reader of stdout is gone; the rest of the output is then discarded."""
    if isinstance(error, SystemExit):  # raised by rich
        return isinstance(error.__context__, BrokenPipeError)
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed again at exit
        return True
    return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agrpo",
        description="Reinforcement learning for masked diffusion language models on Megatron-Core.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"agrpo_megatron {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, phases, text in (
        ("train", ("sft", "rl"), "supervised phase if any, then AGRPO, evaluation and report"),
        ("sft", ("sft",), "only the supervised phase"),
    ):
        command = add_command(commands, name, text, train)
        command.set_defaults(phases=phases)
        add_run(command)
        add_overrides(command)
    add_evaluate(commands)
    command = add_command(commands, "sample", "print completions", sample)
    add_target(command)
    command.add_argument("-n", "--number", type=int, default=3, help="held-out problems (3)")
    command.add_argument(
        "--prompt", help="complete this plain text instead; `agrpo chat` uses the chat template"
    )
    command.add_argument("--trace", action="store_true", help="show the unmasking order in colour")
    add_overrides(command)
    add_serving(commands)
    add_report(commands)
    add_variance(commands)
    add_benchmark(commands)
    add_convert(commands)
    add_plan(commands)
    add_launch(commands)
    add_prefetch(commands)
    add_doctor(commands)
    add_config(commands)
    return parser
