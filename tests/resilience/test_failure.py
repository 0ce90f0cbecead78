"""A rank that fails ends all ranks soon, and its error stands first on the screen."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agrpo_megatron.resilience.failure import LOST
from tests.cli.test_main import write_settings
from tests.resilience.leftovers import assert_gone

ROOT = Path(__file__).parent.parent.parent
FAULTS = Path(__file__).parent / "faulty.py"
BOUND = 30.0  # seconds from the fault until every process is gone
# fault: the first line on the screen that is an error's
FIRST = {
    "broken_code": "rank 1 failed: ZeroDivisionError: somebody divided by zero",
    "out_of_memory": "rank 1 failed: OutOfMemoryError: CUDA out of memory.",
    "killed": "rank 0 failed: ",  # it only knows that a peer is lost
    "interrupted": "rank 0: ending, because rank 1 was interrupted",
}


def _run(tmp_path, *arguments, changes=None):
    settings = {"sft": {"iterations": 1}, "train": {"iterations": 5}, **(changes or {})}
    file = write_settings(tmp_path / "run.yaml", run={"dir": str(tmp_path / "run")}, **settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", str(FAULTS), *arguments, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", FIRST)
def test_a_failing_rank_ends_all_and_speaks_first(tmp_path, fault):
    done = _run(tmp_path, fault, "train")
    ended = time.time()
    struck = [float(t) for t in re.findall(r"fault at ([0-9.]+)", done.stdout)]
    assert struck, done.stderr
    assert ended - max(struck) < BOUND
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if re.match(r"rank \d|Traceback", line)]
    assert lines[0].startswith(FIRST[fault]), done.stderr
    assert_gone(tmp_path)


@pytest.mark.slow
def test_wrong_input_is_one_line_though_every_rank_refuses_it(tmp_path):
    wrong = {"model": {"load": str(tmp_path / "nowhere")}}
    done = _run(tmp_path, "killed", "train", changes=wrong)
    assert done.returncode != 0
    assert done.stderr.count("agrpo: error: ") == 1
    assert "nowhere" in done.stderr and "fault at" not in done.stdout


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        ("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3", True),
        ("Application timeout caused pair closure", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("the loss is not finite; no weights were changed", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", False),
    ],
)
def test_what_only_follows_from_another_rank_is_known_by_its_words(message, is_lost):
    assert bool(LOST.search(message)) == is_lost
