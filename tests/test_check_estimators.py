"""tools/check_estimators.py: the published numbers hold, and a wrong one is noticed."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.config.settings.estimators import ENTRIES
from tests.checking import read_checks, run_tool, whole_name
from tests.ranks import run_ranks

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = FIXTURES / "estimators"
PRESETS = Path(__file__).parent.parent / "examples" / "estimators"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.json"))
# A loss of single tokens, of completions, and of pairs; and a KL over the whole vocabulary.
KINDS = ("diffu_grpo", "espo", "vrpo", "egspo")


def _record(folder, names):
    """Copy methods' records to a folder, with the model where they look for it."""
    shutil.copytree(FIXTURES / "llada_tiny" / "hf", folder / "llada_tiny" / "hf")
    for name in names:
        shutil.copytree(GOLDEN / name, folder / "records" / name)
    return folder / "records"


def _run(folder, arguments, size=1):
    return run_ranks(size, run_tool, "check_estimators", folder, arguments, timeout=400)


@pytest.mark.slow
def test_every_published_number_holds(tmp_path):
    """Log-probs, advantages, losses and all gradients, within the tolerance of the record."""
    ((status, printed),) = _run(tmp_path, [GOLDEN])
    checks, last = read_checks(printed)
    assert status == 0, printed
    assert last == f"{GOLDEN}: 215 of 215 checks passed at tp1-pp1-cp1-dp1"
    assert {name.split()[0] for name in checks} == set(NAMES)
    for name in NAMES:
        cases = json.loads((GOLDEN / name / "golden.json").read_text())["cases"]
        for number in range(len(cases)):
            for part in ("loss", "gradients", "grad_norms"):
                assert checks.pop(f"{name} {number} {part}")[0] == "ok"
    assert {name.split()[2] for name in checks} == {"logps", "seq_logps", "advantages"}


@pytest.mark.parametrize("layout", ["tp2", "pp2", "cp2", "dp2"])
def test_a_layout_changes_no_number(tmp_path, layout):
    records = _record(tmp_path, KINDS)
    results = _run(tmp_path, [records, "--parallel", layout], size=2)
    assert [status for status, _ in results] == [0, 0], results[0][1]
    assert results[1][1] == "", "one rank speaks"
    checks, last = read_checks(results[0][1])
    assert (
        last == f"{records}: {len(checks)} of {len(checks)} checks passed at {whole_name(layout)}"
    )
    assert {name.split()[0] for name in checks} == set(KINDS)


# The last value of a recorded tensor is changed by this much; a mask is turned round.
SPOILT = {
    ("espo", "2.masked"): (None, ["2 seq_logps", "2 loss", "2 gradients", "2 grad_norms"]),
    ("spg", "0.seq_logps"): (1e-3, ["0 seq_logps"]),
    ("unigrpo", "1.grad.model.transformer.ln_f.weight"): (1e-1, ["1 gradients"]),
    ("vrpo", "0.loss"): (1e-3, ["0 loss"]),
    ("wd1", "1.advantages"): (1e-3, ["1 advantages"]),
    ("wd1", "2.grad_norms"): (1e-1, ["2 grad_norms"]),
}


def test_a_wrong_number_fails_its_line_and_the_whole(tmp_path):
    records = _record(tmp_path, dict.fromkeys(name for name, _ in SPOILT))
    for (name, tensor), (change, _) in SPOILT.items():
        file = records / name / "golden.safetensors"
        tensors = load_file(file)
        spoilt = tensors[tensor].clone()
        last = spoilt.view(-1)[-1]
        spoilt.view(-1)[-1] = last + change if change else ~last
        save_file({**tensors, tensor: spoilt}, file)
    ((status, printed),) = _run(tmp_path, [records])
    checks, last = read_checks(printed)
    expected = [f"{name} {part}" for (name, _), (_, parts) in SPOILT.items() for part in parts]
    assert status == 1
    assert [check for check, (word, _) in checks.items() if word == "FAIL"] == expected
    assert f": {len(checks) - len(expected)} of {len(checks)} checks passed" in last


def test_a_records_own_tolerance_and_settings_are_used(tmp_path):
    """Log-probs within 1e-9 are not reached; a clip at 0.4 in place of 0.5 changes the loss."""
    records = _record(tmp_path, ["gdpo"])
    file = records / "gdpo" / "golden.json"
    golden = json.loads(file.read_text())
    golden["tolerance"] = golden["tolerance"].replace(
        "log-probabilities 5e-5", "log-probabilities 1e-9"
    )
    golden["cases"][0]["epsilon"] = 0.4
    file.write_text(json.dumps(golden))
    (records / "gdpo").rename(records / "gdpo_2")
    ((status, printed),) = _run(tmp_path, [records])
    checks, _ = read_checks(printed)
    failed = [name for name, (word, _) in checks.items() if word == "FAIL"]
    assert status == 1
    assert failed == [
        *("gdpo_2 0 seq_logps", "gdpo_2 0 loss"),
        *(f"gdpo_2 {number} seq_logps" for number in (1, 2, 3)),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda golden: golden.update(tolerance="small"), "tolerance='small' names no limits"),
        (lambda golden: golden["cases"][0].update(post_num=2), "post_num=2"),
        (lambda golden: golden.pop("model"), "not the record of a method"),
        (lambda golden: golden.update(model="../none"), "none"),
    ],
)
def test_a_record_that_cannot_be_compared_is_refused(tmp_path, change, said):
    records = _record(tmp_path, ["tracerl"])
    file = records / "tracerl" / "golden.json"
    golden = json.loads(file.read_text())
    change(golden)
    file.write_text(json.dumps(golden))
    _refused(tmp_path, [records], said)


def test_wrong_arguments_are_one_line_and_status_2(tmp_path):
    records = _record(tmp_path, ["wd1"])
    _refused(tmp_path, [tmp_path / "none"], "no folder in it has a golden.json")
    _refused(tmp_path, [records, "--parallel", "tp2"], "parallel.tensor=2 does not divide")
    (records / "wd1").rename(records / "another")
    _refused(tmp_path, [records], "a folder's name starts with its method: diffu_grpo, wd1,")


def _refused(folder, arguments, said):
    ((status, printed),) = _run(folder, arguments)
    assert status == 2, printed
    assert printed.startswith("check_estimators: error: ") and printed.count("\n") == 1
    assert said in printed


def test_every_estimator_has_a_preset_and_the_tool_starts_from_it(monkeypatch):
    """A run that names one as its base is as published except for what it sets itself."""
    monkeypatch.syspath_prepend(str(PRESETS.parents[1] / "tools"))
    tool = importlib.import_module("golden_estimators")
    assert tool.PRESETS == PRESETS
    files = {path.stem: load(Settings, path) for path in sorted(PRESETS.glob("*.yaml"))}
    without = {"block_just_grpo"}  # its public settings are those of one unmerged branch
    assert set(files) == {*ENTRIES, "coupled_dllm_rl"} - without
    assert {method.preset for method in tool.METHODS.values()} == (
        set(files) - {"agrpo", "full_trajectory"}  # tools/conformance.py compares AGRPO
    )
    for name, settings in files.items():
        validate(settings)
        assert settings.algorithm.name == {"coupled_dllm_rl": "coupled_grpo"}.get(name, name)


def test_a_preset_is_a_base(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"base: {PRESETS / 'espo.yaml'}\nalgorithm: {{group_size: 4}}\n")
    settings = load(Settings, file)
    expected = load(Settings, PRESETS / "espo.yaml")
    assert settings.algorithm == replace(expected.algorithm, group_size=4)
    assert (settings.algorithm.kl, settings.algorithm.baseline) == ("k2", "leave_one_out")
