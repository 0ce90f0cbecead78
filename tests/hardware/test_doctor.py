"""`agrpo doctor`: lists installed parts, survives broken ones, explains the choice of kernels."""

import importlib.metadata
import io

import pytest
from rich.console import Console

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.hardware import doctor
from agrpo_megatron.hardware.doctor import Finding, examine, print_findings, print_kernels, summary
from agrpo_megatron.hardware.kernels import choose
from agrpo_megatron.hardware.machine import MISSING, Machine
from tests.hardware.test_machine import HOPPER


def _found(*parts):
    return [Finding(part, True, "1", "") for part in (*doctor.REQUIRED, *parts)]


def test_what_is_installed_is_found_with_its_version():
    findings = {finding.part: finding for finding in examine()}
    for part, name in (("PyTorch", "torch"), ("Megatron-Core", "megatron-core")):
        assert findings[part].found
        assert findings[part].version == importlib.metadata.version(name)
    assert int(findings["CPU cores"].version) >= 1
    assert findings["memory"].version.endswith("GiB")
    assert not summary(list(findings.values()))[0].startswith("cannot run")


@pytest.mark.gpu
def test_a_gpu_is_described():
    (finding, *_) = doctor._gpus()
    assert finding.found
    assert "compute capability" in finding.note


@pytest.mark.parametrize(
    ("problem", "finding"),
    [
        ("", Finding("Part", True, "1.2", "works")),
        (MISSING, Finding("Part", False, "", "get it")),
        ("it is broken: ValueError", Finding("Part", False, "1.2", "it is broken: ValueError")),
    ],
)
def test_a_package_is_a_finding(monkeypatch, problem, finding):
    monkeypatch.setattr(doctor, "import_problem", lambda module: problem)
    monkeypatch.setattr(doctor, "version", lambda distribution: "1.2")
    assert doctor._package("Part", "m", "d", works="works", missing="get it") == finding


@pytest.mark.parametrize(
    ("problem", "gradient", "note"),
    [
        ("", "", "fused optimizer, gradient of the head"),
        ("", MISSING, "fused optimizer; built without the gradient of the head"),
        ("it was built without its kernels", "", "it was built without its kernels: install it"),
        (
            "it is another project named apex",
            "",
            "it is another project named apex: uv pip uninstall apex, then install it",
        ),
        (MISSING, "", "optional: gradient of the head, fused optimizer; install it"),
    ],
)
def test_apex_is_reported_with_its_kernels(monkeypatch, problem, gradient, note):
    monkeypatch.setattr(doctor, "apex_problem", lambda: problem)
    monkeypatch.setattr(doctor, "import_problem", lambda module: gradient)
    finding = doctor._apex()
    assert finding.found == (not problem)
    assert finding.note.removesuffix(" as docs/install.md says") == note


def test_the_versions_of_flash_attention_are_reported(monkeypatch):
    assert not doctor._flash_attention().found
    versions = {"flash-attn": "2.8.3", "flash-attn-3": "3.0.0"}
    monkeypatch.setattr(doctor, "version", lambda name: versions.get(name, ""))
    assert doctor._flash_attention().version == "flash-attn 2.8.3, flash-attn-3 3.0.0"


def test_the_summary_names_the_device():
    assert summary(_found()) == ["device: CPU, ranks joined by gloo"]
    assert summary(_found("GPU 0")) == ["device: GPU, ranks joined by NCCL"]


def test_the_summary_says_first_that_a_run_cannot_start():
    findings = [finding for finding in _found() if finding.part != "PyTorch"]
    assert summary(findings)[0] == "cannot run: PyTorch missing or broken"


def test_the_table_shows_every_part_and_takes_brackets_as_they_are():
    console = Console(width=120, file=io.StringIO())
    findings = [*_found(), Finding("Transformer Engine", False, "", "uv pip install '.[te]'")]
    print_findings(findings, console)
    text = console.file.getvalue()
    assert "uv pip install '.[te]'" in text
    assert all(finding.part in text for finding in findings)


CPU_TABLE = """\
kernels: my.yaml

kernel                chosen       why
layers                local        te needs a GPU, and torch sees none
attention             torch SDPA   of the local layers
norms and products    torch        of the local layers
precision             bfloat16     precision=bf16; fp8 needs a GPU
gradients of layers   separate     fused needs a GPU
gradient of the head  separate     fused needs a GPU
optimizer             torch AdamW  a fused one needs a GPU
batch-invariant       no           kernels.batch_invariant=true needs a GPU
deterministic         yes          CPU kernels are deterministic
CUDA graphs           no           kernels.cuda_graphs=true needs a GPU
"""
HOPPER_TABLE = """\
kernels: my.yaml

kernel                chosen              why
layers                te                  Transformer Engine 2.20.2 on H100
attention             cuDNN fused         Transformer Engine's choice from Hopper on
norms and products    Transformer Engine  a norm and the product after it are one module
precision             FP8 blockwise       products of the layers; all else is bfloat16
gradients of layers   fused               by Transformer Engine
gradient of the head  separate            fused needs NVIDIA Apex with its weight gradients
optimizer             TE fused Adam       Megatron-Core's first choice
batch-invariant       no                  kernels.batch_invariant=true needs flash-attn-3 or
                                          flash-attn-4
deterministic         no                  kernels.deterministic is off
CUDA graphs           no                  kernels.cuda_graphs is off
"""


@pytest.mark.parametrize(
    ("machine", "precision", "table"),
    [(Machine(), "bf16", CPU_TABLE), (HOPPER, "fp8", HOPPER_TABLE)],
)
def test_the_kernels_of_a_run_are_a_table(machine, precision, table):
    console = Console(width=96, file=io.StringIO())
    settings = load(Settings, None, [f"precision={precision}"])
    print_kernels(choose(settings, machine), "my.yaml", console)
    printed = console.file.getvalue().splitlines()
    assert [line.rstrip() for line in printed] == table.splitlines()
