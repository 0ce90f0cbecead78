"""What tests of `agrpo launch` share: calls of the command, shellcheck, a cluster."""

import os
import shutil
import subprocess

import pytest

from agrpo_megatron.cli.main import main
from tests.slurm.conftest import cluster

__all__ = ["cluster"]  # the fixture

SHELLCHECK = shutil.which("shellcheck")


@pytest.fixture
def launch(capsys):
    """Return a function that calls `agrpo launch` here: status, output, errors."""

    def call(*arguments):
        status = main(["launch", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """Hide SLURM's commands."""
    folder = tmp_path / "no slurm"
    folder.mkdir()
    for name in ("bash", "mv", "mkdir", "cat"):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def shellcheck():
    """Return a function that demands that shellcheck finds nothing in a script."""

    def check(script):
        if SHELLCHECK is None:
            if os.environ.get("AGRPO_REQUIRE_SLURM"):
                pytest.fail("AGRPO_REQUIRE_SLURM is set, but shellcheck is not installed")
            pytest.skip("shellcheck is not installed")
        done = subprocess.run([SHELLCHECK, "-"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    return check
