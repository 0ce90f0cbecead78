"""Exports in the tools that people use: PEFT, the library's notebook, Megatron-Bridge's names."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, dynamic_module_utils

from agrpo_megatron.checkpoint.convert import to_hf_directory, to_megatron_checkpoint
from agrpo_megatron.diffusion import SamplingSettings, module_context, sample
from agrpo_megatron.families import settings_from_hf, weight_mappings
from agrpo_megatron.families.peft import write_peft
from tests.families.test_peft import (
    EXPORTS,
    LIMIT,
    _exported,
    adapted_by_peft,
    difference,
    model_of,
    rows_of,
)
from tests.ranks import run_ranks

FIXTURES = Path(__file__).parents[2] / "fixtures"
LLADA, SDAR = FIXTURES / "llada_tiny" / "hf", FIXTURES / "sdar_tiny" / "hf"
FOUR = SamplingSettings(completion_length=8, block_length=4, denoising_steps=4)
# The parameters of Megatron's GPTModel that the bridge of LLaDA converts, and their tensors.
# Source: megatron-bridge 0.6.2, bridge/diffusion/conversion/llada15/llada15_bridge.py.
BLOCK = "model.transformer.blocks.*."
BRIDGE = {
    "embedding.word_embeddings.weight": ("model.transformer.wte.weight",),
    "decoder.final_layernorm.weight": ("model.transformer.ln_f.weight",),
    "output_layer.weight": ("model.transformer.ff_out.weight",),
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": (f"{BLOCK}attn_norm.weight",),
    "decoder.layers.*.self_attention.linear_proj.weight": (f"{BLOCK}attn_out.weight",),
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": (f"{BLOCK}ff_norm.weight",),
    "decoder.layers.*.mlp.linear_fc2.weight": (f"{BLOCK}ff_out.weight",),
    "decoder.layers.*.self_attention.linear_qkv.weight": tuple(
        f"{BLOCK}{part}_proj.weight" for part in "qkv"
    ),
    "decoder.layers.*.mlp.linear_fc1.weight": (f"{BLOCK}ff_proj.weight", f"{BLOCK}up_proj.weight"),
}


def _quiet(_done, _total):
    pass


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that exports a fixture with our modelling file, and loads it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def exported(source):
        to_megatron_checkpoint(source, tmp_path / "m", progress=_quiet)
        to_hf_directory(tmp_path / "m", tmp_path / "h", progress=_quiet, own_code=True)
        return AutoModel.from_pretrained(tmp_path / "h", trust_remote_code=True)

    return exported


def test_exported_adapters_load_on_the_exported_model(load, tmp_path):
    lora, model = EXPORTS["all"], model_of(LLADA)
    tensors, ours = run_ranks(1, _exported, LLADA, lora)[0]
    write_peft(
        tmp_path / "adapters",
        tensors.__getitem__,
        model=model,
        lora=lora,
        base="GSAI-ML/LLaDA",
        dtype=torch.float32,
    )
    module = PeftModel.from_pretrained(load(LLADA), tmp_path / "adapters").eval()
    assert len(adapted_by_peft(module)) == 7 * model.num_layers
    with torch.no_grad():
        theirs = torch.cat([module(row[None]).logits[0] for row in rows_of(model)])
        with module.disable_adapter():
            without = torch.cat([module(row[None]).logits[0] for row in rows_of(model)])
    assert difference(ours, theirs) < LIMIT
    assert difference(ours, without) > 0.1


@pytest.mark.parametrize(
    ("source", "options", "changes"),
    [
        (LLADA, {"mask_id": 159}, {}),
        (SDAR, {"mask_id": 380, "block_length": 4}, {"block_origin": "row"}),
    ],
)
def test_the_library_samples_from_an_export(load, source, options, changes):
    """Rows of several lengths are one padded batch, and have the completions of single rows."""
    context = module_context(load(source), seed=1, **options)
    sampling = replace(FOUR, unmasking="low_confidence", **changes)
    prompts = [torch.arange(1, 1 + length) for length in (3, 9, 6)]
    together = sample(prompts, torch.arange(3), context=context, sampling=sampling)
    assert context.forward._has_mask is True
    for number, prompt in enumerate(prompts):
        alone = sample([prompt], torch.tensor([number]), context=context, sampling=sampling)
        assert torch.equal(alone.tokens[0], together.tokens[number])
        assert (alone.logprobs[0] - together.logprobs[number]).abs().max() < 1e-4


def test_blocks_that_begin_elsewhere_than_the_modules_are_refused(load):
    context = module_context(load(SDAR), mask_id=380, block_length=4)
    with pytest.raises(ValueError, match="use SamplingSettings.block_origin='row'"):
        sample([torch.tensor([1, 2, 3])], torch.arange(1), context=context, sampling=FOUR)


def test_parameters_have_the_names_that_megatron_bridge_converts():
    """Checkpoints have the names of Transformer Engine's layers, which fuse the norms."""
    from agrpo_megatron.checkpoint.torch_dist import checkpoint_place

    model, found = settings_from_hf(LLADA), {}
    for mapping in weight_mappings(model):
        name = checkpoint_place(mapping.megatron, model).key
        name = name.replace("decoder.layers.", "decoder.layers.*.")
        found[name] = tuple(re.sub(r"\.\d+\.", ".*.", part) for part in mapping.parts)
    assert found == BRIDGE
