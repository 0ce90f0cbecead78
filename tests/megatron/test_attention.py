"""Attention by patterns: SDPA run by run and FlexAttention equal an explicit mask."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig

from agrpo_megatron.diffusion.patterns import (
    block_causal,
    full,
    places_of,
    replay,
    row_length,
    visible,
)
from agrpo_megatron.megatron.layers.attention import PackedAttention
from agrpo_megatron.megatron.layers.packed import packed_layout, rotary_angles
from agrpo_megatron.types import PackedRows

HEADS, GROUPS, WIDTH = 4, 2, 8
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def _replays(draw):
    """Return a context with one to three copies of some of its blocks, or of the block after it."""
    block, length = draw(st.sampled_from([1, 2, 4, 5])), draw(st.integers(1, 14))
    copies = []
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, length // block)) * block
        copies.append((first, draw(st.integers(1, length + block - first))))
    return replay(length, block, copies, causal=draw(st.booleans()))


def _rows():
    lengths = st.integers(1, 14)
    blocks = st.builds(block_causal, lengths, st.integers(1, 5), origin=st.integers(0, 4))
    return st.lists(st.one_of(st.builds(full, lengths), blocks, _replays()), min_size=1, max_size=4)


def _packed(rows):
    bounds = torch.tensor([0, *map(row_length, rows)]).cumsum(0)
    tokens = torch.zeros(int(bounds[-1]), dtype=torch.int64)
    return PackedRows(tokens, bounds.int(), tokens[:0], bounds.tolist(), rows)


def _explicit(query, key, value, rows):
    """Attend by the whole mask: rotated pairs, scores, softmax."""
    angles = rotary_angles(
        places_of(rows, torch.device("cpu")).position, head_dim=WIDTH, rope_theta=100.0
    )
    turn = torch.complex(angles.cos(), angles.sin())[..., : WIDTH // 2]

    def rotated(x):
        first, second = x.chunk(2, -1)
        turned = torch.complex(first, second) * turn
        return torch.cat([turned.real, turned.imag], -1)

    query, key = rotated(query), rotated(key)
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    tokens = torch.arange(len(query))
    mask = visible(places_of(rows, query.device), tokens[:, None], tokens[None])
    scores = torch.einsum("qhd,khd->hqk", query, key) / WIDTH**0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@pytest.mark.parametrize("use_flex", [False, True], ids=["sdpa", "flex"])
@given(rows=_rows(), seed=st.integers(0, 2**20))
@FEW
def test_every_execution_equals_an_explicit_mask(use_flex, rows, seed):
    """FlexAttention on a CPU is torch's plain computation, whose backward pass it refuses there.

    With the refusal off, its mask and its gradients are checked; the compiled kernel needs a GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flex, "_validate_device", lambda *_: None)
        _compare(rows, seed, use_flex=use_flex)


def _compare(rows, seed, *, use_flex):
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS)
    attention = PackedAttention(config, pg_collection=SimpleNamespace(cp="unused"))
    rows = [*rows, rows[-1]]  # two neighbours share a call
    layout = packed_layout(
        _packed(rows),
        angles=lambda x: rotary_angles(x, head_dim=WIDTH, rope_theta=100.0),
        context=SimpleNamespace(rank=0, size=1),
        use_flex=use_flex,
    )
    generator, count = torch.Generator().manual_seed(seed), sum(map(row_length, rows))
    inputs = [
        torch.randn(count, heads, WIDTH, generator=generator, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    weight = torch.randn(count, HEADS * WIDTH, generator=generator)
    ours = attention(*inputs, packed_seq_params=layout)
    expected = _explicit(*inputs, rows)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    found, wanted = (torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, expected))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * (1 + other.norm())
