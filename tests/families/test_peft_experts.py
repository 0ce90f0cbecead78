"""PEFT's format where experts have adapters: shared ones, and fused queries, keys and values."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from agrpo_megatron.config.settings import LoraSettings
from agrpo_megatron.families.peft import TENSORS, lora_settings_of
from tests.families.test_peft import FIXTURES, check_export, check_import, made_by_peft, model_of

LLADA_MOE, LLADA2 = (FIXTURES / f"{name}_tiny" / "hf" for name in ("lladamoe", "llada2"))


@pytest.mark.parametrize(
    ("source", "modules"),
    [(LLADA_MOE, None), (LLADA_MOE, ["experts.*", "q_proj"]), (LLADA2, None)],
    ids=["all", "experts", "shared and fused"],
)
def test_peft_loads_an_export_of_experts_and_has_our_logits(tmp_path, source, modules):
    check_export(tmp_path, source, LoraSettings(rank=3, alpha=6.0, modules=modules))


@pytest.mark.parametrize(
    ("source", "layers"),
    [(LLADA_MOE, ["v_proj", "experts.5.up_proj", "down_proj"]), (LLADA2, "all-linear")],
    ids=["some", "all"],
)
def test_what_peft_saves_of_experts_is_read_and_has_its_logits(tmp_path, source, layers):
    check_import(tmp_path, source, 1, {"target_modules": layers})


def test_an_adapter_on_a_router_is_refused(tmp_path):
    made_by_peft(LLADA_MOE, tmp_path, target_modules=["up_proj"])
    router = "base_model.model.model.layers.0.mlp.gate.lora_A.weight"
    changed = {**load_file(tmp_path / TENSORS), router: torch.zeros(8, 64)}
    save_file(changed, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="is of a router, which gets no adapter; train without"):
        lora_settings_of(tmp_path, model_of(LLADA_MOE))
