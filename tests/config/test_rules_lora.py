"""What adapters are refused, and that nothing is set without them."""

import pytest

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.resolve import resolve

SMALL = ["model.hidden_size=32", "task.name=countdown", "task.train_problems=4"]
REFERENCE = ["lora.rank=4", "algorithm.kl_coefficient=0.1"]


def _refusal(*overrides):
    with pytest.raises(ValueError, match="lora|sft") as error:
        validate(load(Settings, None, [*SMALL, *overrides]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nothing_of_adapters_is_set_without_a_rank():
    assert _refusal("lora.alpha=8") == (
        "lora.alpha=8 is for adapters, and lora.rank is null; set lora.rank, for example to 64, "
        "or use lora.alpha=64"
    )
    assert "or use lora.modules=null" in _refusal("lora.modules=[q_proj]")


REFUSED = {
    "no layers": (["lora.rank=4", "lora.modules=[]"], "names no layer; use null"),
    "no folder": (["lora.rank=4", "lora.load=nowhere"], "lora.load=nowhere is not a directory"),
    "FP8 weights": (
        [
            "lora.rank=4",
            "lora.merge_rollouts=true",
            "precision=fp8",
            "fp8.primary_weights=true",
            "optimizer.distributed=true",
        ],
        "use lora.merge_rollouts=false",
    ),
    "supervised phase": ([*REFERENCE, "sft.iterations=3"], "sft.iterations=3 changes the policy"),
    "a whole head": ([*REFERENCE, "lora.train_head=true"], "use lora.train_head=false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_adapters_is_refused(name):
    overrides, said = REFUSED[name]
    assert said in _refusal(*overrides)


def test_every_pipeline_stage_has_something_to_train():
    two = ["lora.rank=4", "parallel=pp2", "model.num_layers=4"]
    settings = load(Settings, None, [*SMALL, *two, "lora.modules=[blocks.0.*, blocks.1.*]"])
    with pytest.raises(ValueError, match="names nothing in layers 2 to 3, which are a pipeline"):
        resolve(settings, world_size=2)
    settings = load(Settings, None, [*SMALL, *two, "lora.modules=[blocks.3.*, blocks.1.q_proj]"])
    resolve(settings, world_size=2)


@pytest.mark.parametrize(
    ("layout", "rollout", "key"),
    [("tp2-sp-etp2", "tp2-sp", "parallel"), ("ep2", "tp2-sp-etp2", "rollout.parallel")],
)
def test_adapters_of_split_experts_stay_in_one_layout(layout, rollout, key):
    experts = ["model.family=llada_moe", "model.moe={experts: 4, ffn_hidden_size: 24}"]
    given = [*SMALL, *experts, f"parallel={layout}", f"rollout.parallel={rollout}"]
    validate(load(Settings, None, given), 2)
    with pytest.raises(ValueError, match=rf"^{key}\.expert_tensor=2 splits .*; use {key}\.exp"):
        validate(load(Settings, None, [*given, "lora.rank=4"]), 2)
