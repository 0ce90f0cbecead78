"""Schedules of attention: their stages, and what they are refused."""

import pytest

from agrpo_megatron.config.annealing import Stage, attention_at, scheduled_iterations, stages
from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings

BLOCKS = ["model.attention=block_causal", "model.block_length=32", "sampling.block_length=32"]
ANNEAL, SCHEDULE = "sft.anneal_iterations=10", "sft.block_schedule=[1x4, full x 2, 8x2]"
ON = "sft.iterations=11"


def _settings(*overrides):
    return load(Settings, None, overrides)


def test_a_schedule_is_read():
    settings = _settings(SCHEDULE, *BLOCKS, ON)
    validate(settings)
    assert stages(settings) == [Stage(1, 4), Stage(None, 2), Stage(8, 2)]
    assert scheduled_iterations(settings) == 8
    lengths = [attention_at(settings, number).model.block_length for number in range(1, 12)]
    assert lengths == [1, 1, 1, 1, None, None, 8, 8, 32, 32, 32]


def test_annealing_ends_with_whole_rows():
    settings = _settings(ANNEAL, ON)
    validate(settings)
    found = [attention_at(settings, number).ahead for number in (1, 2, 10, 11, 12)]
    assert found == [0.0, 0.1, 0.9, None, None]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([ANNEAL, SCHEDULE, ON], "are two schedules of attention; use one of them"),
        ([ANNEAL], "sft.anneal_iterations=10 is for a supervised phase, and sft.iterations=0 has"),
        ([ANNEAL, "sft.iterations=10"], "sft.iterations=10 leaves none .* use more than 10"),
        ([SCHEDULE, *BLOCKS, "sft.iterations=8"], "takes 8 iterations"),
        ([ANNEAL, ON, *BLOCKS], "model.attention=block_causal; use sft.block_schedule"),
        ([SCHEDULE, ON, "model.shift=true"], "use model.shift=false, or sft.anneal_iterations"),
        (["sft.block_schedule=[4]", ON], "has the wrong type"),
        (["sft.block_schedule=['0x5']", ON], "sft.block_schedule: 0x5 is no stage; write a block"),
        (["sft.block_schedule=[4x0]", ON], "4x0 is no stage"),
        (["sft.block_schedule=[]", ON], r"sft.block_schedule=\[\] has no stage; use null"),
        ([ANNEAL, ON, "parallel=cp2"], "parallel.context=2 shares them; use context=1"),
        (
            [SCHEDULE, ON, "model.attention=causal_context", *BLOCKS[1:]]
            + ["sft.autoregressive_weight=1"],
            "sft.autoregressive_weight is set; use sft.block_schedule=null",
        ),
        ([ANNEAL, ON, "sft.loss=vrpo", "sft.data=pairs.jsonl"], "sft.loss=vrpo is set; use"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, said):
    with pytest.raises(ValueError, match=said) as error:
        validate(_settings(*overrides), 2 if "parallel=cp2" in overrides else 1)
    assert "\n" not in str(error.value)
