"""The first lines of a run: at most eight, with what it runs on, trains, takes and writes."""

import re

import pytest

from agrpo_megatron.reports.banner import banner
from agrpo_megatron.runs.progress import Progress
from agrpo_megatron.runs.sizes import Sizes
from tests.training.tiny import tiny

KNOWN = ["run.dir=runs/mine", "model.mask_token_id=1", "model.eos_token_id=2"]
SIZES = Sizes([6, 9], [6] * 7, 0)
BOTH = ("sft", "rl")


def lines(*overrides, phases=BOTH, world_size=2, done=None):
    settings = tiny(*KNOWN, *overrides)
    facts = {"device": "CPU, 1 thread", "world_size": world_size, "phases": phases}
    found = banner(settings, SIZES, **facts, done=done)
    assert len(found) <= 8 and all("\n" not in line for line in found)
    return {line.split()[0]: line[10:] for line in found}


def test_a_run_says_what_it_is():
    found = lines("sft.iterations=5", "train.iterations=10", "evaluation.interval=5")
    assert found["device"] == "2 ranks on CPU, 1 thread; layout tp1-pp1-cp1-dp2, fp32"
    # Twice 83 x 16, a norm, and two layers of 3 x 256, 3 x 16 x 32 and 2 x 16.
    assert found["model"] == "llada, 7344 parameters, 7344 trained"
    assert found["plan"] == (
        "5 supervised iterations, 10 iterations of reinforcement learning, "
        "3 evaluations of 7 problems"
    )
    assert found["iteration"] == "3 prompts x 4 completions of 8 tokens in 4 steps: 96 tokens"
    flops = r"[\d.]+ MFLOP of rollouts and [\d.]+ MFLOP of updates an iteration at most, "
    assert re.fullmatch(f"{flops}24 scored states", found["cost"])
    assert found["writes"] == (
        "runs/mine: metrics.jsonl, samples.jsonl, checkpoints/; wandb disabled"
    )
    assert found["stop"] == "by Ctrl-C; the same command resumes the run"


def test_profiled_iterations_are_named():
    assert "profile" not in lines()
    assert lines("profile.start=2")["profile"] == "rl iteration 2, by torch"
    several = lines("profile.start=2", "profile.iterations=3", "profile.tool=nsys")
    assert several["profile"] == "rl iterations 2 to 4, by nsys"


@pytest.mark.parametrize(
    ("phase", "iteration", "end"),
    [
        ("sft", 9, ""),
        ("rl", 1, ""),
        ("rl", 2, "; now from iteration 3 on"),
        ("rl", 4, "; nothing now, as the run resumes after rl iteration 4"),
    ],
)
def test_a_resumed_run_says_what_is_left_of_the_profile(phase, iteration, end):
    window = ["profile.start=2", "profile.iterations=3"]
    found = lines(*window, done=Progress(phase, iteration, {}))
    assert found["profile"] == f"rl iterations 2 to 4, by torch{end}"
    if phase == "rl":
        over = lines(*window, "profile.phase=sft", done=Progress(phase, iteration, {}))
        assert "; nothing now, as the run resumes after rl iteration" in over["profile"]


def test_adapters_and_a_supervised_run():
    found = lines("lora.rank=2", "sft.iterations=5", phases=("sft",))
    assert found["model"].endswith("trained in adapters of rank 2")
    assert found["plan"] == "5 supervised iterations"
    assert lines("sft.iterations=1", phases=("sft",))["plan"] == "1 supervised iteration"
    assert "iteration" not in found and "cost" not in found


def test_an_estimator_that_fails_early_has_no_cost(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def score(rollout, context):\n    raise KeyError('steps')\n")
    assert "cost" not in lines(f"algorithm.name={mine}:score")


def test_an_error_of_the_package_s_own_estimators_is_not_hidden(monkeypatch):
    def fail_by(error):
        def count_flops(*_):
            raise error

        monkeypatch.setattr("agrpo_megatron.scaling.forecast.work.count_flops", count_flops)

    fail_by(KeyError("steps"))
    with pytest.raises(KeyError):
        lines()
    fail_by(MemoryError())
    assert "cost" not in lines()
