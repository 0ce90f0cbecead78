"""Report which parts a run can use on this machine, and which kernels it chooses.

Importing this module loads none of them. A broken part is reported, never raised.
"""

import importlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agrpo_megatron.hardware.kernels import Kernels
from agrpo_megatron.hardware.machine import (
    FLASH_ATTENTION,
    INSTALL,
    MISSING,
    apex_problem,
    import_problem,
    one_line,
    quiet,
    release,
    version,
)

GIB = 2**30
REINSTALL = "reinstall with `make install`"
REQUIRED = ("PyTorch", "Megatron-Core", "sentencepiece")


@dataclass(frozen=True)
class Finding:
    """One part of the machine or the installation."""

    part: str
    found: bool  # installed, and it works as far as an import shows
    version: str  # or size; may be empty
    note: str  # what it allows, or what to do


def examine() -> list[Finding]:
    """Look at every part; imports them all, in about ten seconds."""
    return [
        Finding("Python", True, platform.python_version(), sys.executable),
        _torch(),
        *_gpus(),
        _megatron_core(),
        _package(
            "Transformer Engine",
            "transformer_engine.pytorch",
            "transformer-engine",
            works="fused layers, FP8 and fused optimizer, on a GPU",
            missing=f"optional: fused layers and FP8; {INSTALL}",
        ),
        _apex(),
        _flash_attention(),
        _resilience(),
        _package("wandb", works="offline by default; logging.wandb=online needs `wandb login`"),
        _package("sentencepiece", works="reads .model files, the built-in characters among them"),
        _package("transformers", works="reads the tokenizers of Hugging Face directories"),
        _cores(),
        _memory(),
    ]


def summary(findings: Sequence[Finding]) -> list[str]:
    """Return lines: whether a run can start, and on which device."""
    here = {finding.part for finding in findings if finding.found}
    missing = [part for part in REQUIRED if part not in here]
    lines = [f"cannot run: {', '.join(missing)} missing or broken"] if missing else []
    gpu = any(part.startswith("GPU") for part in here)
    return [
        *lines,
        f"device: {'GPU, ranks joined by NCCL' if gpu else 'CPU, ranks joined by gloo'}",
    ]


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings as a table, and the summary below it."""
    table = _table("part", "", "version", "what that means", whole=("part", ""))
    for finding in findings:
        color = "red" if finding.part in REQUIRED else "yellow"
        state = Text("yes", "green") if finding.found else Text("no", color)
        table.add_row(finding.part, state, Text(finding.version), Text(finding.note))
    console.print(table)
    console.print()
    for line in summary(findings):
        head, _, rest = line.partition(": ")
        console.print(Text.assemble((f"{head}: ", "bold"), rest))


def print_kernels(kernels: Kernels, of: str, console: Console) -> None:
    """Print which kernels a run uses, and why; `of` names its settings."""
    table = _table("kernel", "chosen", "why", whole=("kernel", "chosen"))
    for note in kernels.notes:
        table.add_row(note.part, Text(note.chosen, style="cyan"), Text(note.why))
    console.print(Text.assemble(("kernels: ", "bold"), of), end="\n\n")
    console.print(table)


def _table(*headings: str, whole: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=heading in whole)
    return table


def _torch() -> Finding:
    finding = _package("PyTorch", "torch", "torch", works="")
    if not finding.found:
        return finding
    build = importlib.import_module("torch").version.cuda
    return replace(finding, note=f"built for CUDA {build}" if build else "built without CUDA")


def _gpus() -> list[Finding]:
    try:
        with quiet():
            torch = importlib.import_module("torch")
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    except Exception as error:
        return [Finding("GPU", False, "", f"torch cannot query it: {one_line(error)}")]
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
    )
    if finding.found and release(finding.version) != (0, 19):
        return replace(finding, found=False, note=f"must be 0.19: {REINSTALL}")
    return finding


def _apex() -> Finding:
    part, problem = "NVIDIA Apex", apex_problem()
    if problem == MISSING:
        return Finding(
            part, False, "", f"optional: gradient of the head, fused optimizer; {INSTALL}"
        )
    if problem:
        remedy = "uv pip uninstall apex, then " if "another" in problem else ""
        return Finding(part, False, version("apex"), f"{problem}: {remedy}{INSTALL}")
    gradient = import_problem("fused_weight_gradient_mlp_cuda")
    note = f"fused optimizer{'; built without the' if gradient else ','} gradient of the head"
    return Finding(part, True, version("apex"), note)


def _flash_attention() -> Finding:
    found = [f"{name} {has}" for name in FLASH_ATTENTION.values() if (has := version(name))]
    works = "Transformer Engine's attention may use it; 3 or 4 for kernels.batch_invariant"
    note = works if found else f"optional: for kernels.batch_invariant; {INSTALL}"
    return Finding("flash attention", bool(found), ", ".join(found), note)


def _resilience() -> Finding:
    finding = _package(
        "nvidia-resiliency-ext",
        "nvidia_resiliency_ext",
        "nvidia-resiliency-ext",
        works="ft_launcher finds and restarts hung ranks",
        missing="optional; uv pip install -e '.[resilience]'",
    )
    if finding.found and release(finding.version) < (0, 6):
        return replace(finding, note="Megatron-Core needs 0.6 or newer, which needs glibc 2.39")
    return finding


def _cores() -> Finding:
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("CPU cores", True, str(mine), "shared by the ranks, see run.threads")


def _memory() -> Finding:
    try:
        memory = importlib.import_module("psutil").virtual_memory()
    except Exception as error:
        return Finding("memory", False, "", f"psutil cannot read it: {one_line(error)}")
    note = f"{memory.available / GIB:.0f} GiB of it free"
    return Finding("memory", True, f"{memory.total / GIB:.0f} GiB", note)


def _package(
    part: str, module: str = "", distribution: str = "", *, works: str, missing: str = REINSTALL
) -> Finding:
    """Import `module` to see whether it works; its exception becomes the note.

    Module and distribution are named as the part by default.
    """
    problem = import_problem(module or part)
    if problem == MISSING:
        return Finding(part, False, "", missing)
    return Finding(part, not problem, version(distribution or part), problem or works)
