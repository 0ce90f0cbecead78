"""Say which parts a run can use on this machine, and what follows from that.

Importing this module loads none of them. A part that is broken is reported, never raised.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30
REINSTALL = "reinstall with `make install`"
REQUIRED = ("PyTorch", "Megatron-Core", "sentencepiece")
FUSED = ("Transformer Engine", "NVIDIA Apex")


@dataclass(frozen=True)
class Finding:
    """One part of the machine or the installation."""

    part: str
    found: bool  # there, and it works as far as can be told without a run
    version: str  # or size; empty where there is none
    note: str  # what it allows, or what to do


def examine() -> list[Finding]:
    """Look at every part; imports them all, which takes some ten seconds."""
    return [
        _python(),
        _torch(),
        *_gpus(),
        _megatron_core(),
        _transformer_engine(),
        _apex(),
        _resilience(),
        _package(
            "wandb",
            "wandb",
            "wandb",
            works="offline by default; logging.wandb=online needs `wandb login`",
            missing=REINSTALL,
        ),
        _package(
            "sentencepiece",
            "sentencepiece",
            "sentencepiece",
            works="reads .model files, the built-in characters among them",
            missing=REINSTALL,
        ),
        _package(
            "transformers",
            "transformers",
            "transformers",
            works="reads the tokenizers of Hugging Face directories",
            missing=REINSTALL,
        ),
        _cores(),
        _memory(),
    ]


def summary(findings: Sequence[Finding]) -> list[str]:
    """Return lines that say which device, layers, precision and kernels a run takes, and why."""
    here = {finding.part for finding in findings if finding.found}
    missing = [part for part in REQUIRED if part not in here]
    lines = [f"cannot run: {', '.join(missing)} missing or broken"] if missing else []
    gpu = any(part.startswith("GPU") for part in here)
    return [
        *lines,
        f"device: {'GPU, ranks joined by NCCL' if gpu else 'CPU, ranks joined by gloo'}",
        "layer spec: local, Megatron-Core's layers with attention through torch SDPA; "
        "the Transformer Engine spec is not built yet",
        "precision: float32; bfloat16 and FP8 are not built yet",
        f"optimizer: {_optimizer(here, gpu=gpu)}",
    ]


def print_findings(findings: Sequence[Finding], console: "Console") -> None:
    """Print the findings as a table, and the summary below it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("part", "", "version", "what that means"):
        table.add_column(heading, no_wrap=heading in ("part", ""))
    for finding in findings:
        if finding.found:
            state = Text("yes", style="green")
        else:
            state = Text("no", style="red" if finding.part in REQUIRED else "yellow")
        table.add_row(finding.part, state, Text(finding.version), Text(finding.note))
    console.print(table)
    console.print()
    for line in summary(findings):
        head, _, rest = line.partition(": ")
        console.print(Text.assemble((f"{head}: ", "bold"), rest))


def _optimizer(here: set[str], *, gpu: bool) -> str:
    """Name the kernels as Megatron-Core chooses them: the first of `FUSED` that it can import."""
    for part in FUSED:
        if part in here:
            problem = "" if gpu else "; it needs a GPU, so uninstall it to train on a CPU"
            return f"fused Adam of {part}, as Megatron-Core can import it{problem}"
    return f"torch's AdamW; Megatron-Core would take fused kernels of {' or '.join(FUSED)}"


def _python() -> Finding:
    return Finding("Python", True, platform.python_version(), sys.executable)


def _torch() -> Finding:
    finding = _package("PyTorch", "torch", "torch", works="", missing=REINSTALL)
    if not finding.found:
        return finding
    build = importlib.import_module("torch").version.cuda
    return replace(finding, note=f"built for CUDA {build}" if build else "built without CUDA")


def _gpus() -> list[Finding]:
    try:
        with _quiet():
            torch = importlib.import_module("torch")
            devices = [
                torch.cuda.get_device_properties(index)
                for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
            ]
    except Exception as error:
        return [Finding("GPU", False, "", f"torch cannot ask: {_one_line(error)}")]
    if not devices:
        return [Finding("GPU", False, "", "torch sees none: runs use the CPU and gloo")]
    return [
        Finding(
            f"GPU {index}",
            True,
            f"{device.total_memory / GIB:.0f} GiB",
            f"{device.name}, compute capability {device.major}.{device.minor}",
        )
        for index, device in enumerate(devices)
    ]


def _megatron_core() -> Finding:
    finding = _package(
        "Megatron-Core",
        "megatron.core",
        "megatron-core",
        works="model, parallelism, optimizer and checkpoints",
        missing=REINSTALL,
    )
    if finding.found and _release(finding.version) != (0, 19):
        return replace(finding, found=False, note=f"must be 0.19: {REINSTALL}")
    return finding


def _transformer_engine() -> Finding:
    return _package(
        "Transformer Engine",
        "transformer_engine.pytorch",
        "transformer-engine",
        works="fused optimizer kernels; its layer spec and FP8 are not built here yet",
        missing="optional; on a GPU: uv pip install -e '.[te]' (compiles against torch)",
    )


def _apex() -> Finding:
    part, source = "NVIDIA Apex", "NVIDIA's is built from its sources"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding(part, False, "", f"optional; {source}")
    version = _version("apex")
    folders = [Path(folder, "optimizers") for folder in spec.submodule_search_locations or ()]
    if not any(folder.is_dir() for folder in folders):
        note = f"another project named apex: uv pip uninstall apex; {source}"
        return Finding(part, False, version, note)
    finding = _package(part, "apex.optimizers", "apex", works="fused optimizer kernels", missing="")
    if not finding.found:
        return finding
    return _package(part, "amp_C", "apex", works=finding.note, missing="built without its kernels")


def _resilience() -> Finding:
    finding = _package(
        "nvidia-resiliency-ext",
        "nvidia_resiliency_ext",
        "nvidia-resiliency-ext",
        works="its use in training is not built here yet",
        missing="optional; uv pip install -e '.[resilience]'",
    )
    if finding.found and _release(finding.version) < (0, 6):
        return replace(finding, note="Megatron-Core wants 0.6 or newer, which needs glibc 2.39")
    return finding


def _cores() -> Finding:
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("CPU cores", True, str(mine), "shared by the ranks, see run.threads")


def _memory() -> Finding:
    try:
        memory = importlib.import_module("psutil").virtual_memory()
    except Exception as error:
        return Finding("memory", False, "", f"psutil cannot tell: {_one_line(error)}")
    note = f"{memory.available / GIB:.0f} GiB of it free"
    return Finding("memory", True, f"{memory.total / GIB:.0f} GiB", note)


def _package(part: str, module: str, distribution: str, *, works: str, missing: str) -> Finding:
    """Import `module` to see whether it works; whatever it raises becomes the note."""
    try:
        with _quiet():
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return Finding(part, False, "", missing)
        return Finding(part, False, _version(distribution), f"broken: {_one_line(error)}")
    except Exception as error:
        return Finding(part, False, _version(distribution), f"broken: {_one_line(error)}")
    return Finding(part, True, _version(distribution), works)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep imports from talking: here, what is absent is told once, in the table."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version; none where it has none."""
    return tuple(int(number) for number in version.split(".")[:2] if number.isdecimal())


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
