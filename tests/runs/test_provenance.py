"""An attempt records its code, versions, command, host and devices."""

import subprocess
import sys

import torch

from agrpo_megatron.runs.history import provenance as module
from agrpo_megatron.runs.history.provenance import provenance, read_provenance, write_provenance
from agrpo_megatron.training.measures.devices import device_text
from tests.training.tiny import tiny


def _made(monkeypatch, *command):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/agrpo", *command])
    settings = tiny("parallel.tensor=2")
    return provenance(settings, ranks=2, device="CPU, 1 thread", seconds=9.0)


def test_an_attempt_says_what_made_its_numbers(monkeypatch, tmp_path):
    found = _made(monkeypatch, "train", "a b.yaml", "run.seed=1")
    assert found["command"] == "agrpo train 'a b.yaml' run.seed=1"
    assert (found["ranks"], found["layout"], found["precision"]) == (2, "tp2-pp1-cp1", "fp32")
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert found["time"].endswith("+00:00") and found["host"]
    for _ in range(2):
        write_provenance(tmp_path, found)
    with (tmp_path / "provenance.jsonl").open("a") as file:
        file.write('{"time": ')
    assert read_provenance(tmp_path) == [found, found]
    write_provenance(tmp_path, found)  # the line that was cut short costs only itself
    assert read_provenance(tmp_path) == [found] * 3
    assert read_provenance(tmp_path / "none") == []


def _git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_the_commit_is_the_package_s_own_not_that_of_a_project_around_it(monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(module, "ROOT", package)
    assert (_made(monkeypatch)["commit"], _made(monkeypatch)["changed"]) == (None, None)
    _git(tmp_path, "init")
    assert _made(monkeypatch)["commit"] is None  # the project does not track it
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "a")
    found = _made(monkeypatch)
    assert len(found["commit"]) == 40 and found["changed"] is False
    (package / "__init__.py").write_text("a = 1")
    assert _made(monkeypatch)["changed"] is True


def test_a_device_is_named_in_words():
    before = torch.get_num_threads()
    try:
        for threads, text in ((1, "CPU, 1 thread"), (2, "CPU, 2 threads")):
            torch.set_num_threads(threads)
            assert device_text(torch.device("cpu")) == text
    finally:
        torch.set_num_threads(before)
