"""Preference pairs: settings that contradict them, or have no meaning without them, are refused."""

import pytest

from agrpo_megatron.config.rules import validate
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings

VRPO = ["model.hidden_size=32", "sft.iterations=3", "sft.loss=vrpo", "sft.data=pairs.jsonl"]
REFUSED = {
    "solutions": (
        [*VRPO, "sft.data=null"],
        "sft.loss=vrpo learns from pairs of answers, and solutions of the task are single; set "
        "sft.data to rows with the columns prompt, chosen and rejected, or use sft.loss=denoising",
    ),
    "replies": (
        [*VRPO, "sft.turns=last"],
        "sft.turns=last is of sft.loss=denoising, and sft.loss is vrpo; use sft.turns=random",
    ),
    "beta of single texts": (
        ["sft.preferences.beta=0.7"],
        "sft.preferences.beta=0.7 is for preference pairs, and sft.loss is denoising; set "
        "sft.loss=vrpo, or use sft.preferences.beta=0.2",
    ),
    "weights of single texts": (
        [*VRPO, "sft.mask_epsilon=0.1"],
        "sft.mask_epsilon=0.1 is of sft.loss=denoising, and sft.loss is vrpo; use "
        "sft.mask_epsilon=0.001",
    ),
    "other adapters": (
        [*VRPO, "lora.rank=4", "lora.train_head=true"],
        "lora.train_head=true changes the policy before or beyond its adapters, and the reference "
        "of sft.loss=vrpo is the model without them; use lora.train_head=false",
    ),
    "dropout": (
        [*VRPO, "lora.rank=4", "lora.dropout=0.1"],
        "lora.dropout=0.1 changes the policy between the pass that measures margins and the one "
        "with gradient, and sft.loss=vrpo needs both equal; use lora.dropout=0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_pairs_is_refused(name):
    overrides, said = REFUSED[name]
    with pytest.raises(ValueError, match="sft.loss") as error:
        validate(load(Settings, None, overrides))
    assert str(error.value) == said
