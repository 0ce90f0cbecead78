"""`agrpo serve`, `agrpo chat` and `agrpo lm-eval`: a trained model without its task."""

import argparse
import importlib.util
import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from agrpo_megatron.cli.common import (
    TARGET,
    Target,
    add_command,
    add_overrides,
    add_target,
    is_main,
    open_target,
    world_size,
)
from agrpo_megatron.evaluation.target import find_target

if TYPE_CHECKING:
    from agrpo_megatron.serving.model import Model

SERVE = """\
examples:
  agrpo serve runs/tiny                                   http://127.0.0.1:8000/v1
  agrpo serve models/LLaDA-8B-Instruct precision=bf16 evaluation.denoising_steps=128
  MY_KEY=secret agrpo serve runs/a --checkpoint best --host 0.0.0.0 --api-key-env MY_KEY
  torchrun --nproc-per-node 2 -m agrpo_megatron serve runs/a parallel.tensor=2

  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "7 5=12:"}])

`evaluation` and `sampling.completion_length` are the defaults of requests. The first Ctrl-C
finishes accepted requests and refuses new ones; the second ends at once. docs/serving.md has more.
"""
CHAT = """\
examples:
  agrpo chat models/LLaDA-8B-Instruct precision=bf16 sampling.completion_length=128
  agrpo chat runs/a --system 'Answer in one sentence.'
  echo '7 5=12:' | agrpo chat runs/tiny

/reset forgets the conversation, /trace shows the order in which the last reply was written, /help
lists the commands, Ctrl-D ends. Replies appear block by block.
"""
LM_EVAL = """\
examples:
  agrpo lm-eval runs/tiny --tasks my_task --include_path my_tasks --output_path results
  agrpo lm-eval models/LLaDA-8B-Instruct evaluation.denoising_steps=256 --tasks gsm8k \\
      --apply_chat_template --num_fewshot 4 --output_path results --log_samples
  agrpo lm-eval runs/a --checkpoint best --mc-samples 256 --tasks arc_challenge --limit 100
  torchrun --nproc-per-node 8 -m agrpo_megatron lm-eval models/LLaDA-8B-Base --tasks mmlu

Settings stand directly after TARGET; all other arguments are lm-eval's own
(`python -m lm_eval run --help`), except --model and --model_args. docs/evaluation.md explains
how completions and likelihoods are computed.
"""


def add_serving(commands: argparse._SubParsersAction) -> None:
    """Add the commands that use a model without its task."""
    text = "an OpenAI-compatible server of a model"
    command = add_command(commands, "serve", text, serve, epilog=SERVE)
    add_target(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="port (8000); 0: any free one")
    command.add_argument("--name", help="of the model, for clients; default: that of the run")
    command.add_argument(
        "--api-key-env", metavar="VARIABLE", help="environment variable with the key of clients"
    )
    add_overrides(command)
    command = add_command(commands, "chat", "a chat in the terminal", chat, epilog=CHAT)
    add_target(command)
    command.add_argument("--system", metavar="TEXT", help="system message")
    add_overrides(command)
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


def serve(arguments: argparse.Namespace) -> int:
    """Serve a model over HTTP until the process is interrupted."""
    _require("fastapi", extra="serve")
    _require("uvicorn", extra="serve")
    key = None
    if arguments.api_key_env is not None and not (key := os.environ.get(arguments.api_key_env)):
        raise ValueError(
            f"--api-key-env {arguments.api_key_env}: this variable is empty or not set; set it"
        )
    target = open_target(arguments)
    name = arguments.name or target.run or target.name
    listener = _listening(arguments.host, arguments.port) if is_main() else None
    from agrpo_megatron.serving.server import serve
    from agrpo_megatron.serving.worker import on_interrupt

    with on_interrupt(lambda: None) if listener is None else nullcontext(), _led(target) as model:
        if model is not None and listener is not None:
            host, port = listener.getsockname()[:2]
            print(f"serving {name} at http://{host}:{port}/v1 (Ctrl-C ends)", flush=True)
            serve(model, name=name, listener=listener, key=key)
            print("no more requests: ended", flush=True)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Chat with a model."""
    target = open_target(arguments)
    from rich.console import Console

    from agrpo_megatron.serving.chat import converse, prompted

    with _led(target) as model:
        if model is not None:
            console, sampling = Console(), model.settings.evaluation_sampling
            converse(model, sampling, prompted(console), console, system=arguments.system)
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before a model is loaded."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: {error}; use another one") from None


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
