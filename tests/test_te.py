"""The tests in tests/te, run by an interpreter that has Transformer Engine; most machines do not.

It is apart from the rest because its extension works with one version of torch. No GPU is needed:
tests/te/kernels.py stands in for its kernels.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-te" / "bin" / "python"  # as `make te` makes it


@pytest.mark.slow
def test_the_te_layer_spec_on_stand_in_kernels():
    if not PYTHON.exists():
        missing = "no Transformer Engine; `make te` installs it from wheels"
        if os.environ.get("AGRPO_REQUIRE_TE"):
            pytest.fail(f"AGRPO_REQUIRE_TE is set, but there is {missing}")
        pytest.skip(missing)
    done = subprocess.run(
        [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/te"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout.splitlines()[-1] and "skipped" not in done.stdout
