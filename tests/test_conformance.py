"""tools/conformance.py: the golden numbers hold at each layout, and a wrong one is noticed."""

import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.checking import read_checks, run_tool, whole_name
from tests.devices import DEVICE, Elsewhere, OtherDevice, move
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "conformance.py"
GOLDEN = Path(__file__).parent / "fixtures" / "llada_tiny"
NAMES = [
    "logits",
    *(f"sampler {number}" for number in range(3)),
    *(f"agrpo {number} {part}" for number in range(3) for part in ("loss", "gradients")),
]


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "cp2", "dp2"])
def test_the_golden_numbers_hold(tmp_path, layout):
    """Logits within 1e-5, the samplers token for token, losses 1e-5, gradients 1e-4 relative."""
    size = int(layout[-1])
    results = run_ranks(size, run_tool, "conformance", tmp_path, [GOLDEN, "--parallel", layout])
    assert [status for status, _ in results] == [0] * size
    assert all(printed == "" for _, printed in results[1:]), "one rank speaks"
    checks, last = read_checks(results[0][1])
    assert list(checks) == NAMES
    assert last == f"{GOLDEN}: 10 of 10 checks passed at {whole_name(layout)}"
    for name, (word, error) in checks.items():
        limit = 0 if "sampler" in name else 1e-4 if "gradients" in name else 1e-5
        assert word == "ok" and error <= limit


SDAR = GOLDEN.parent / "sdar_tiny"
SDAR_NAMES = [
    *("logits", "train", "packed", "tracerl shrink 1", "tracerl shrink 2"),
    *(f"decode {number}" for number in range(10)),
]


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "dp2"])
def test_the_golden_numbers_of_sdar_hold(tmp_path, layout):
    """Block-causal logits, doubled rows, TraceRL's log-probs, decodes and their steps."""
    results = run_ranks(
        int(layout[-1]), run_tool, "conformance", tmp_path, [SDAR, "--parallel", layout]
    )
    assert {status for status, _ in results} == {0}
    checks, last = read_checks(results[0][1])
    assert list(checks) == SDAR_NAMES
    assert last == f"{SDAR}: 15 of 15 checks passed at {whole_name(layout)}"


DREAM = GOLDEN.parent / "dream_tiny"
DREAM_NAMES = [
    *(f"{rows}{way}" for rows in ("logits", "leftpad", "hole") for way in ("", " shifted")),
    *(f"sampler {number}" for number in range(8)),
]


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "cp2"])
def test_the_golden_numbers_of_dream_hold(tmp_path, layout):
    """Raw and shifted logits, packed in place of padded; all of its sampler's ways to unmask."""
    results = run_ranks(
        int(layout[-1]), run_tool, "conformance", tmp_path, [DREAM, "--parallel", layout]
    )
    assert {status for status, _ in results} == {0}
    checks, last = read_checks(results[0][1])
    assert list(checks) == DREAM_NAMES
    assert last == f"{DREAM}: 14 of 14 checks passed at {whole_name(layout)}"


# Folder: layouts by ranks, and the number of checks.
EXPERTS = {
    "sdarmoe_tiny": ({"ep2": 2}, 23),
    "lladamoe_tiny": ({"tp2-ep2": 2}, 9),
    "llada2_tiny": ({"pp2-ep2": 4}, 17),
}


@pytest.mark.parametrize(
    ("folder", "layout"), [(f, layout) for f, (sizes, _) in EXPERTS.items() for layout in sizes]
)
def test_the_golden_numbers_of_experts_hold(tmp_path, folder, layout):
    """Logits, routers' choices and weights, outputs of experts, decodes."""
    sizes, count = EXPERTS[folder]
    where = GOLDEN.parent / folder
    arguments = [where, "--parallel", layout]
    results = run_ranks(sizes[layout], run_tool, "conformance", tmp_path, arguments)
    assert {status for status, _ in results} == {0}, results[0][1]
    checks, last = read_checks(results[0][1])
    assert len(checks) == count and any(name.startswith("router") for name in checks)
    assert last.startswith(f"{where}: {count} of {count} checks passed at ")


def _check_elsewhere(folder):
    """Check logits and samplers with weights and golden tensors on another device."""
    tool = runpy.run_path(str(TOOL), run_name="conformance")
    golden = tool["_open"](folder, "tp1")
    network, ranks = golden.network, replace(golden.network.ranks, device=DEVICE)
    for chunk in network.chunks:
        move(chunk)
        chunk.ranks = ranks
    engine = replace(golden.engine, network=replace(network, ranks=ranks))
    there = {name: Elsewhere(tensor) for name, tensor in golden.tensors.items()}
    golden = replace(golden, engine=engine, tensors=there)
    dist.all_reduce = lambda *_: None  # gloo takes no stand-in; there is one rank
    with OtherDevice():
        checks = [*tool["check_logits"](golden), *tool["check_sampler"](golden)]
    return {check.name: check.error <= check.limit for check in checks}


@pytest.mark.parametrize(("folder", "count"), [(GOLDEN, 4), (DREAM, 14)])
def test_golden_numbers_are_compared_on_the_networks_device(folder, count):
    (passed,) = run_ranks(1, _check_elsewhere, folder)
    assert len(passed) == count and all(passed.values())


@pytest.mark.slow
def test_the_golden_numbers_hold_under_a_launcher():
    """As a user starts it: two processes of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--standalone", str(TOOL), str(GOLDEN), "--parallel", "pp2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{GOLDEN}: 10 of 10 checks passed at tp1-pp2-cp1-dp1"


# The last value of a golden tensor is changed by this much; a token becomes the next one.
SPOILT = {
    "logits.logits": (1e-2, ["logits"]),
    "sampler.1.output_ids": (1, ["sampler 1"]),
    "agrpo.0.loss": (1e-3, ["agrpo 0 loss"]),
    "agrpo.1.policy.model.transformer.wte.weight": (0.5, ["agrpo 1 loss", "agrpo 1 gradients"]),
    "agrpo.2.grad.model.transformer.ln_f.weight": (1e-1, ["agrpo 2 gradients"]),
}


def test_a_wrong_number_fails_its_line_and_the_whole(tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "golden")
    tensors = load_file(folder / "golden.safetensors")
    for name, (change, _) in SPOILT.items():
        tensors[name].view(-1)[-1] += change
    save_file(tensors, folder / "golden.safetensors")
    ((status, printed),) = run_ranks(1, run_tool, "conformance", tmp_path, [folder])
    checks, last = read_checks(printed)
    assert status == 1
    expected = [line for _, lines in SPOILT.values() for line in lines]
    assert [name for name, (word, _) in checks.items() if word == "FAIL"] == expected
    assert last.endswith(": 4 of 10 checks passed at tp1-pp1-cp1-dp1")


def test_wrong_arguments_are_one_line_and_status_2(tmp_path):
    for arguments, said in (
        ([tmp_path], "not a conformance directory"),
        ([GOLDEN, "--parallel", "two"], "--parallel"),
        ([GOLDEN, "--parallel", "tp2"], "parallel.tensor=2 does not divide the 1 ranks"),
    ):
        ((status, printed),) = run_ranks(1, run_tool, "conformance", tmp_path, arguments)
        assert status == 2
        assert printed.startswith("conformance: error: ") and printed.count("\n") == 1
        assert said in printed
