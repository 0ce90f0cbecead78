"""Splitting tensors over ranks and joining them is bit-exact."""

import pytest
import torch

from agrpo_megatron.config.settings import ModelSettings
from agrpo_megatron.families import FAMILIES, hf_shapes
from agrpo_megatron.families.tensors import expand
from agrpo_megatron.families.transforms import Split, from_megatron, to_megatron

MODEL = ModelSettings(
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=24,
    num_attention_heads=8,
    num_query_groups=4,  # two queries to a key
    vocab_size=37,  # not a multiple of 2 or 4
    qkv_bias=True,
    qk_norm=True,
)
MAPPINGS = expand(FAMILIES["llada"].mappings(MODEL), MODEL)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("line", MAPPINGS, ids=lambda line: line.megatron)
def test_shards_of_all_ranks_give_back_the_tensors_bit_for_bit(line, size):
    shapes = hf_shapes(MODEL)
    parts = [torch.randn(shapes[name]) for name in line.parts]
    shards = [to_megatron(parts, line.transform, MODEL, Split(r, size)) for r in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    padding = -MODEL.vocab_size % size * MODEL.hidden_size if line.transform == "vocab" else 0
    copies = size if line.transform == "copy" else 1
    held = sum(shard.numel() for shard in shards)
    assert held == copies * sum(part.numel() for part in parts) + padding
    back = from_megatron(shards, line.transform, MODEL)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


def test_qkv_lies_group_by_group_as_megatron_reads_it():
    """Two groups of two heads of width 1: rows are q0 q1 k0 v0, then q2 q3 k1 v1."""
    model = ModelSettings(hidden_size=4, num_attention_heads=4, num_query_groups=2)
    q, k, v = torch.arange(4.0), torch.arange(2.0) + 10, torch.arange(2.0) + 20
    fused = to_megatron([q, k, v], "qkv", model, Split())
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert to_megatron([q, k, v], "qkv", model, Split(1, 2)).tolist() == [2, 3, 11, 21]


def test_each_rank_holds_its_gate_above_its_up():
    gate, up = torch.arange(4.0), torch.arange(4.0) + 10
    assert to_megatron([gate, up], "gate_up", MODEL, Split(1, 2)).tolist() == [2, 3, 12, 13]


def test_a_padded_vocabulary_ends_in_zeros_on_the_last_rank():
    embedding = torch.ones(37, 3)
    last = to_megatron([embedding], "vocab", MODEL, Split(3, 4))
    assert last.shape == (10, 3)
    assert last.sum(1).tolist() == [3.0] * 7 + [0.0] * 3
