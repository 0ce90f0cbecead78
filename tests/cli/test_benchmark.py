"""`agrpo benchmark`: its table, its JSON, and what it refuses."""

import json

from agrpo_megatron.benchmark.plan import KINDS, make_plan
from agrpo_megatron.cli.benchmark import EPILOG
from agrpo_megatron.cli.main import _parser
from tests.cli.test_main import agrpo, call, probe
from tests.ranks import run_ranks

SMALL = ["--layers=1", "--hidden=16", "--heads=2", "--ffn=32", "--vocab=50", "--batch=2"]
SMALL += ["--prompt-length=4", "--completion-length=8", "--denoising-steps=4", "--mc-samples=2"]
SMALL += ["--repeats=2"]
SIDE = {"forwards", "token_forwards", "scored_rows", "flops", "seconds", "seconds_median"}
SIDE |= {"seconds_min", "tokens_per_second", "peak_bytes", "flops_per_second", "ceiling_share"}


def test_a_table_and_a_json_object_as_the_last_line(tmp_path):
    words = ["benchmark", "iteration", *SMALL, "--reference", "--ceiling", "--json"]
    status, printed = agrpo(tmp_path, *words)
    assert status == 0, printed
    assert "rows of the head" in printed and "speedup" in printed
    assert "equal to the reference in float32: all 16 tokens and their steps" in printed
    found = json.loads(printed.splitlines()[-1])
    assert set(found) == {
        *("kind", "model", "work", "threads", "repeats", "clock", "ours", "reference", "ratios"),
        *("speedup", "equality", "ceiling_flops_per_second", "body", "provenance"),
    }
    for side in (found["ours"], found["reference"]):
        assert set(side) == SIDE and len(side["seconds"]) == 2
        assert all(side[key] > 0 for key in SIDE - {"seconds"})
    assert found["body"] is None  # of rollouts alone
    assert found["speedup"]["min"] <= found["speedup"]["max"]
    assert found["ratios"]["flops"] == found["reference"]["flops"] / found["ours"]["flops"]
    assert found["provenance"]["packages"]["torch"] and found["provenance"]["precision"] == "fp32"
    assert found["model"]["vocab_size"] == 50 and found["work"]["mc_samples"] == 2


def test_ours_alone_of_a_block_model(tmp_path):
    """A block model has no reference here."""
    blocks = ["model.family=sdar", "model.attention=block_causal", "model.block_length=4"]
    blocks += ["sampling.block_origin=row", "--block-length=4", "--precision=bf16"]
    status, printed = agrpo(tmp_path, "benchmark", "train-step", *SMALL, *blocks, "--json")
    assert status == 0, printed
    found = json.loads(printed.splitlines()[-1])
    assert found["reference"] is found["speedup"] is found["equality"] is None
    assert found["ours"]["tokens_per_second"] > 0


def test_wrong_words_are_refused_before_torch_loads():
    result = probe("benchmark", "rollout", "--preset=sdar-8b", "--reference")
    assert result.returncode == 2 and "model.family=sdar: --reference" in result.stderr
    assert "torch" not in result.stdout.split()


def test_several_ranks_are_refused(tmp_path):
    result = probe("benchmark", "rollout", WORLD_SIZE="2", RANK="0")
    assert result.returncode == 2
    assert "WORLD_SIZE=2: agrpo benchmark measures one rank" in result.stderr


def _unequal(words, folder):
    from agrpo_megatron.benchmark import equality

    equality.TOLERANCE = 0.0
    return call(words, folder)


def test_no_speed_is_printed_of_what_is_not_equal(tmp_path):
    words = ["benchmark", "rollout", *SMALL, "--reference"]
    status, printed = run_ranks(1, _unequal, words, tmp_path)[0]
    assert status == 1 and "not equal to the reference, so not timed: log-probs" in printed
    assert "seconds" not in printed


def test_the_help_has_an_example_of_each_kind():
    lines = [line.split("  ") for line in EPILOG.splitlines() if line.startswith("  agrpo")]
    plans = []
    for _, command, *_ in lines:
        words = vars(_parser().parse_args(command.split()[1:]))
        plans.append(make_plan(words["kind"], words, words["overrides"]))
    assert sorted(plan.kind for plan in plans) == sorted(KINDS)
