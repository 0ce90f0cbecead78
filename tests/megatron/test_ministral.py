"""Nemotron-Labs-Diffusion's transformer against Ministral 3 of transformers, with the same weights.

Causal rows take its own mask; rows with an open block, or with copies, a mask written out here.
"""

from dataclasses import replace

import pytest
import torch
from transformers import Ministral3Config, Ministral3ForCausalLM

from agrpo_megatron.config.settings import ModelSettings, RunSettings, Settings
from agrpo_megatron.diffusion.blocks import state_rows
from agrpo_megatron.diffusion.patterns import block_causal, places_of, replay
from agrpo_megatron.families import FAMILIES
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.megatron.weights import export_hf, initialise
from agrpo_megatron.types import PackedRows
from tests.ranks import run_ranks
from tests.training.tiny import tiny

BLOCK, LENGTH = 4, 71
MODEL = ModelSettings(
    family="nemotron_diffusion",
    num_layers=2,
    hidden_size=48,  # queries are wider
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=96,
    mask_token_id=95,
    eos_token_id=11,
    max_sequence_length=256,
    rope_theta=1e4,
    rope_factor=16.0,
    rope_original_length=16,  # rows are four times as long
    query_scale_beta=0.5,
    attention="causal_context",
    block_length=BLOCK,
    init_std=0.15,
)
VARIANTS = {
    "published": MODEL,
    "a factor of queries and keys": replace(MODEL, rope_attention_factor=1.2),
    "plain": replace(MODEL, rope_factor=1.0, rope_original_length=None, query_scale_beta=0.0),
}


def _tokens(count):
    return torch.randint(0, 95, (count,), generator=torch.Generator().manual_seed(3))


def _theirs(tensors, model, tokens, *, positions=None, mask=None):
    """Return the logits of transformers' model; `mask` [T, T]: who sees whom."""
    config = FAMILIES[model.family].config(model)
    names = [key for key in config if hasattr(Ministral3Config, key) or key == "rope_parameters"]
    config = Ministral3Config(**{name: config[name] for name in names if name != "model_type"})
    config._attn_implementation = "eager"
    theirs = Ministral3ForCausalLM(config).eval()
    named = {
        name.replace("encoder.", "model.", 1).replace("diffusion_head", "lm_head"): tensor
        for name, tensor in tensors.items()
    }
    theirs.load_state_dict(named, strict=True)
    if mask is not None:
        least = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, least)[None, None]
    rows = None if positions is None else positions[None]
    return theirs(input_ids=tokens[None], attention_mask=mask, position_ids=rows).logits[0]


def _cases():
    """Return rows of one pattern each with masks; None: transformers' own causal mask."""
    tokens = torch.arange(LENGTH)
    causal = tokens[:, None] >= tokens
    sampling = tiny(f"sampling.block_length={BLOCK}", "sampling.block_origin=row").sampling
    (open_row,) = state_rows([LENGTH], [10], MODEL, sampling) or [()]
    first = (LENGTH - 1) // BLOCK * BLOCK
    is_open = causal | ((tokens >= first) & (tokens[:, None] >= first))
    cases = {
        "causal": (block_causal(LENGTH, 1), None),
        "an open block": (open_row, is_open),
    }
    # A context, and copies of tokens 40 to 47 and 60 to 63: each block of a copy sees itself and
    # the context before it.
    copies = [(40, 8), (60, 4)]
    row = replay(LENGTH, BLOCK, copies, causal=True)
    mask = torch.zeros(LENGTH + 12, LENGTH + 12, dtype=torch.bool)
    mask[:LENGTH, :LENGTH] = causal
    for start, at in ((40, LENGTH), (44, LENGTH + 4), (60, LENGTH + 8)):
        mask[at : at + 4, :start] = True
        mask[at : at + 4, at : at + 4] = True
    return {**cases, "copies of blocks": (row, mask)}


def _compared(model):
    """Return differences of logits by case and execution, and how much each feature changes."""
    settings = Settings(run=RunSettings(threads=1), model=model)
    network = build_network(settings, start_ranks(settings))
    network.set_training("eval")
    initialise(network, model, 0)
    (chunk,) = network.chunks
    named = {name: p.detach() for name, p in network.named_parameters()}
    tensors = export_hf(named, model, network.ranks)
    found = {}
    with torch.no_grad():
        for name, (row, mask) in _cases().items():
            positions = places_of([row], torch.device("cpu")).position
            tokens = _tokens(len(positions))
            bounds = torch.tensor([0, len(tokens)])
            every = torch.arange(len(tokens))
            rows = PackedRows(tokens, bounds.int(), every, bounds.tolist(), [row])
            theirs = _theirs(tensors, model, tokens, positions=positions, mask=mask)
            assert theirs.abs().max() > 1
            for use_flex in (False, True):
                chunk.use_flex = use_flex
                found[name, use_flex] = float((chunk(rows) - theirs).abs().max())
        causal = _theirs(tensors, model, _tokens(LENGTH))
        without = [
            float((_theirs(tensors, other, _tokens(LENGTH)) - causal).abs().max())
            for other in (replace(model, rope_factor=1.0), replace(model, query_scale_beta=0.0))
            if model.rope_factor > 1
        ]
    return found, without


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_ministral_3(name):
    """Rows go far beyond the original length; without either feature logits are others."""
    found, without = run_ranks(1, _compared, VARIANTS[name])[0]
    assert len(found) == 6
    assert max(found.values()) < 1e-5, found
    assert all(change > 0.01 for change in without) and len(without) == 2 * (name != "plain")
