"""Under ft_launcher, a hung rank's stack is printed, the ranks restart, and the run is the same."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agrpo_megatron.config.settings import ResilienceSettings, Settings
from agrpo_megatron.resilience.nvrx import LATER, PACKAGE, launcher_options
from agrpo_megatron.resilience.sections import NAMES
from tests.cli.test_main import call, write_settings
from tests.ranks import run_ranks
from tests.resilience.leftovers import assert_gone
from tests.training.tiny import same_metrics

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "hanging.py"
# A Python with nvidia-resiliency-ext: as named, as `make resilience` makes it, or this one.
CANDIDATES = (
    os.environ.get("AGRPO_NVRX_PYTHON", ""),
    str(ROOT / ".venv-resilience" / "bin" / "python"),
    sys.executable,
)
LAUNCH = "from nvidia_resiliency_ext.fault_tolerance.launcher import main; main()"
WORDS = "agrpo_megatron.resilience.nvrx"
LIMIT = 6.0  # seconds, of a section whose learned limit would be shorter


@pytest.fixture(scope="module")
def nvrx():
    """Return a Python that has the package; skip without one, or fail where it is required."""
    look = f"from importlib.util import find_spec; raise SystemExit(find_spec('{PACKAGE}') is None)"
    for python in filter(os.path.exists, CANDIDATES):
        if subprocess.run([python, "-c", look]).returncode == 0:
            return python
    missing = "no Python with nvidia-resiliency-ext; `make resilience` makes one"
    if os.environ.get("AGRPO_REQUIRE_NVRX"):
        pytest.fail(f"AGRPO_REQUIRE_NVRX is set, but there is {missing}")
    pytest.skip(missing)


def _environment(**more):
    plain = {key: v for key, v in os.environ.items() if not key.startswith(("SLURM", "AGRPO"))}
    plain |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**plain, **more}


def _run(command, folder, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=_environment(**environment),
        cwd=folder,
    )
    return done.returncode, done.stdout


def _launcher(python, settings, *overrides, restarts):
    """Return the beginning of a command that starts two ranks."""
    words = subprocess.run(
        [sys.executable, "-m", WORDS, settings, *overrides], capture_output=True, text=True
    ).stdout.splitlines()
    assert len(words) == 4
    ranks = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    return [python, "-c", LAUNCH, *ranks, *words]


def _metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_hung_rank_is_told_restarted_and_the_run_ends_as_an_undisturbed_one(tmp_path, nvrx):
    check = "from megatron.core.dist_checkpointing.strategies.nvrx import has_nvrx_async_support"
    status, printed = _run([nvrx, "-c", f"{check}\nprint(has_nvrx_async_support())"], tmp_path)
    assert status == 0 and printed.endswith("True\n"), printed
    file = write_settings(
        tmp_path / "run.yaml",
        run={"dir": str(tmp_path / "run"), "threads": 1},
        resilience={"timeouts": {"rollout": LIMIT}},
        checkpoint={"interval": 1, "background": True},  # by the package's own writer
    )
    status, printed = _run(
        [*_launcher(nvrx, file, restarts=2), "-m", "agrpo_megatron", "train", file],
        tmp_path,
        AGRPO_FAULTS="hang:rank=1,section=rollout,iteration=2",
        AGRPO_FAULTS_DIR=str(tmp_path / "faults"),
    )
    assert status == 0, printed
    assert len(list((tmp_path / "faults").iterdir())) == 1
    assert printed.count("rank 1 hangs in section rollout (rl iteration 2)") == 1
    assert re.search(r'faults.py", line [0-9]+ in _hang$', printed, re.MULTILINE), "its stack"
    assert f"Timeout is {LIMIT + LATER:.2f} seconds." in printed, "ft_launcher has the limit"
    assert printed.count("resuming after") == 1
    plain = tmp_path / "plain"
    words = ["train", file, f"run.dir={plain}", "checkpoint.background=false"]
    assert [status for status, _ in run_ranks(2, call, words, tmp_path)] == [0, 0]
    metrics = _metrics(tmp_path / "run")
    assert sum(record["phase"] == "rl" and "grad_norm" in record for record in metrics) == 3
    assert same_metrics(metrics, _metrics(plain))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["holds_the_lock", "is_stopped"])
def test_a_rank_that_cannot_answer_ends_with_its_stack(tmp_path, nvrx, fault):
    file = tmp_path / "run.yaml"
    file.write_text(f"run: {{dir: '{tmp_path / 'run'}'}}\nresilience: {{least_timeout: {LIMIT}}}\n")
    status, printed = _run([*_launcher(nvrx, file, restarts=0), SCRIPT, fault, file], tmp_path)
    ended = time.time()
    assert status != 0
    [struck] = re.findall(r"fault at ([0-9.]+)", printed)
    assert ended - float(struck) < LIMIT + LATER + 60  # of which the launcher takes most
    assert "rank 1 hangs in section rollout (rl iteration 3) of rank 0" in printed
    assert re.search(r'hanging.py", line [0-9]+ in main$', printed, re.MULTILINE)
    assert_gone(tmp_path)


def test_the_launcher_is_given_the_limits_of_all_sections():
    settings = Settings(
        resilience=ResilienceSettings(first_timeout=100, timeouts={"rollout": 30, "setup": 7})
    )
    words = dict(word.split("=") for word in launcher_options(settings))
    limits = dict(pair.split(":") for pair in words["--ft-rank-section-timeouts"].split(","))
    assert limits.keys() == {*NAMES, "warmup"}  # which turns the watch between sections on
    assert float(limits["rollout"]) == 30 + LATER and float(limits["setup"]) == 7 + LATER
    assert float(limits["update"]) == 100 + LATER
    assert float(words["--ft-rank-out-of-section-timeout"]) == 100 + LATER
    assert launcher_options(Settings(resilience=ResilienceSettings(watchdog="never"))) == []


def test_job_scripts_get_the_words_without_loading_torch(tmp_path):
    file = write_settings(tmp_path / "a run.yaml")
    probe = (
        "import sys; from agrpo_megatron.resilience.nvrx import main; status = main(sys.argv[1:])\n"
        "print('torch' in sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", probe, file]
    status, printed = _run([*command, "--restart", "resilience.first_timeout=9"], tmp_path)
    assert status == 0 and f"update:{9 + LATER:g}," in printed and printed.endswith("False\n")
    status, printed = _run([*command, "resilience.watchdog=never"], tmp_path)
    assert (status, printed) == (0, "False\n")
    status, printed = _run([*command, "resilience.watchdg=off"], tmp_path)
    assert status == 2 and "resilience.watchdog" in printed
