"""The network: packed rows do not meet, attention sees both ways, names are Megatron's."""

from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import ModelSettings, RunSettings, Settings
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.megatron.weights import export_hf, initialise
from agrpo_megatron.types import PackedRows
from tests.megatron.literal import literal_logits
from tests.ranks import run_ranks

MODEL = ModelSettings(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=50,
    mask_token_id=49,
    max_sequence_length=64,
    rope_theta=100.0,  # so that far positions turn far within these short rows
    init_std=0.3,
)
VARIANTS = {
    "llada": replace(MODEL, num_query_groups=None),
    "grouped": MODEL,
    "bias and qk-norm": replace(MODEL, qkv_bias=True, qk_norm=True),
    "wide heads": replace(MODEL, head_dim=12, qkv_bias=True, qk_norm=True),
    "narrow heads that do not divide": replace(MODEL, hidden_size=30, head_dim=6, qk_norm=True),
}
LENGTHS = (7, 7, 3, 11, 1)


def pack(rows):
    """Return rows as one pack with every token scored."""
    lengths = torch.tensor([0] + [len(row) for row in rows])
    tokens = torch.cat(rows)
    return PackedRows(tokens, lengths.cumsum(0).to(torch.int32), torch.arange(len(tokens)))


def _random_rows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (length,), generator=generator) for length in LENGTHS]


def _built(model):
    settings = Settings(run=RunSettings(threads=1), model=model)
    network = build_network(settings, start_ranks(settings))
    network.set_training("eval")
    initialise(network, model, 0)
    with torch.no_grad():  # biases and norms that do something
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return network, network.chunks[0]


def _forward_errors(model):
    """Return the largest difference from single rows, and from the literal transformer.

    The latter is computed in float64; its error is relative to the largest logit.
    """
    network, chunk = _built(model)
    named = {n: p.detach() for n, p in network.named_parameters()}
    tensors = export_hf(named, model, network.ranks)
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    rows = _random_rows()
    with torch.no_grad():
        packed = chunk(pack(rows)).split(LENGTHS)
        alone = [chunk(pack([row])) for row in rows]
        literal = [literal_logits(tensors, model, row) for row in rows]
    scale = max(float(logits.abs().max()) for logits in literal)
    assert scale > 1
    return (
        max(float((a - b).abs().max()) for a, b in zip(packed, alone, strict=True)),
        max(float((a - b).abs().max()) for a, b in zip(packed, literal, strict=True)) / scale,
    )


def _who_sees_whom():
    """Change the fourth row's last token; return every row's change, and its first token's."""
    _, chunk = _built(MODEL)
    rows = _random_rows()
    changed = [row.clone() for row in rows]
    changed[3][-1] = (changed[3][-1] + 1) % 50
    with torch.no_grad():
        before, after = chunk(pack(rows)), chunk(pack(changed))
    change = (before - after).abs().split(LENGTHS)
    return [float(row.max()) for row in change], float(change[3][0].max())


def _scored_rows():
    """Return the logits of some tokens, the same from all, and the head's input shapes."""
    _, chunk = _built(MODEL)
    rows = pack(_random_rows())
    seen = []
    last = chunk.decoder.layers[-1]
    for module in (last.self_attention.linear_proj, last.mlp.linear_fc1, chunk.output_layer):
        module.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    some = torch.tensor([0, 5, 6, 20, 28])
    with torch.no_grad():
        few, full = chunk(replace(rows, scored=some)), chunk(rows)
        none = chunk(replace(rows, scored=some[:0]))
    return few, full[some], none, seen


def _names(model):
    """Return names and shapes of ours and of GPTModel's parameters."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    network, chunk = _built(model)
    theirs = GPTModel(
        config=network.config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            qk_layernorm=model.qk_norm, normalization="RMSNorm"
        ),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_sequence_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (chunk, theirs)]


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_rows_equal_rows_alone_and_a_literal_transformer(name):
    alone, literal = run_ranks(1, _forward_errors, VARIANTS[name])[0]
    assert alone < 1e-5
    assert literal < 1e-5


def test_the_first_token_sees_the_last_and_no_other_row_does():
    rows, first = run_ranks(1, _who_sees_whom)[0]
    assert first > 1e-2
    assert [change > 0 for change in rows] == [False, False, False, True, False]


def test_the_end_of_the_last_layer_and_the_head_run_on_the_scored_tokens_only():
    few, expected, none, seen = run_ranks(1, _scored_rows)[0]
    assert seen == [(count, 1, 32) for count in (5, 29, 4) for _ in range(3)]
    assert none.shape == (0, 50)
    assert torch.allclose(few, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llada", "bias and qk-norm"])
def test_parameters_are_named_and_shaped_as_gptmodels(name):
    ours, theirs = run_ranks(1, _names, VARIANTS[name])[0]
    assert ours == theirs
    assert len(ours) == (6 if name == "llada" else 9) * 2 + 3
