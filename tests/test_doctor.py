"""`agrpo doctor`: tells what is there, survives what is broken."""

import importlib.metadata
import io
import sys

import pytest
from rich.console import Console

from agrpo_megatron import doctor
from agrpo_megatron.doctor import Finding, examine, print_findings, summary


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that puts a package of the given files first on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, **modules):
        folder = tmp_path / name
        folder.mkdir()
        for module, text in {"__init__": "", **modules}.items():
            path = folder.joinpath(*module.split("__DOT__")).with_suffix(".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, loaded)

    before = set(sys.modules)
    yield make
    for loaded in set(sys.modules) - before:
        origin = getattr(sys.modules[loaded], "__file__", None) or ""
        if origin.startswith(str(tmp_path)):
            del sys.modules[loaded]


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
    ("text", "note"),
    [
        (
            "raise OSError('libnccl.so.2: cannot open')",
            "broken: OSError: libnccl.so.2: cannot open",
        ),
        ("raise RuntimeError('first\\nsecond')", "broken: RuntimeError: first"),
        ("raise ValueError", "broken: ValueError"),
        ("import no_such_package", "broken: ModuleNotFoundError: No module named"),
    ],
)
def test_a_broken_package_is_a_finding_with_a_one_line_reason(package, text, note):
    package("transformer_engine", pytorch=text)
    finding = doctor._transformer_engine()
    assert not finding.found
    assert finding.note.startswith(note)
    assert "\n" not in finding.note


def test_an_absent_package_says_how_to_get_it():
    finding = doctor._package("Part", "no_such_package.inner", "no", works="", missing="get it")
    assert finding == Finding("Part", False, "", "get it")


def test_the_registrys_apex_is_told_apart_from_nvidias(package):
    package("apex", __init__="from pyramid import config")
    finding = doctor._apex()
    assert not finding.found
    assert finding.note.startswith("another project named apex: uv pip uninstall apex")


def test_apex_without_its_kernels_is_not_usable(package):
    package("apex", optimizers__DOT____init__="FusedAdam = object")
    finding = doctor._apex()
    assert not finding.found
    assert finding.note == "built without its kernels"
    package("amp_C")
    assert doctor._apex().found


def test_the_summary_names_what_a_run_takes():
    assert summary(_found())[0] == "device: CPU, ranks joined by gloo"
    assert summary(_found())[-1].startswith("optimizer: torch's AdamW;")
    on_gpu = summary(_found("GPU 0", "Transformer Engine", "NVIDIA Apex"))
    assert on_gpu[0] == "device: GPU, ranks joined by NCCL"
    assert on_gpu[-1].startswith("optimizer: fused Adam of Transformer Engine")
    assert "needs a GPU" in summary(_found("NVIDIA Apex"))[-1]


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
