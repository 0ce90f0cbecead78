"""What tests of `agrpo launch` share: calls of the command, and a cluster where there is one."""

import os
import shutil
import subprocess

import pytest

from agrpo_megatron.cli import main

REQUIRE = "AGRPO_REQUIRE_SLURM"  # set where tests must not be skipped for want of SLURM's tools
SHELLCHECK = shutil.which("shellcheck")


def missing(what):
    """Skip a test for want of a tool, or fail it where the tool must be there."""
    if os.environ.get(REQUIRE):
        pytest.fail(f"{what}, and {REQUIRE} is set")
    pytest.skip(what)


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
def slurm():
    """Demand a cluster that answers."""
    try:
        done = subprocess.run(["sinfo", "-h"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        missing("SLURM is not installed")
    else:
        if done.returncode != 0 or not done.stdout.strip():
            missing("no SLURM cluster answers")


@pytest.fixture
def shellcheck():
    """Return a function that demands that shellcheck finds nothing in a script."""

    def check(script):
        if SHELLCHECK is None:
            missing("shellcheck is not installed")
        done = subprocess.run([SHELLCHECK, "-"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    return check
