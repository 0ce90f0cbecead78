"""Which published layers get adapters: usual ones by family, patterns, wrong names."""

from dataclasses import replace

import pytest

from agrpo_megatron.config.settings import LoraSettings, ModelSettings
from agrpo_megatron.families import FAMILIES, hf_shapes
from agrpo_megatron.families.lora import adapted_layers, linear_layers, trained_whole
from agrpo_megatron.families.tensors import with_values

MODEL = ModelSettings(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=50,
)
PUBLISHED = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
STANDARD = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
STANDARDS = ("dream", "sdar", "nemotron_diffusion", "llama", "qwen2", "qwen3")
NAMES = {"llada": PUBLISHED} | dict.fromkeys(STANDARDS, STANDARD)
STARTS = dict.fromkeys(NAMES, "model.layers.")
STARTS |= {"llada": "model.transformer.blocks.", "nemotron_diffusion": "encoder.layers."}
EMBEDDINGS = dict.fromkeys(NAMES, "model.embed_tokens")
EMBEDDINGS |= {"llada": "model.transformer.wte", "nemotron_diffusion": "encoder.embed_tokens"}
HEADS = dict.fromkeys(NAMES, "lm_head")
HEADS |= {"llada": "model.transformer.ff_out", "nemotron_diffusion": "diffusion_head"}


def of(family):
    """Return a model of a family."""
    return with_values(replace(MODEL, family=family), FAMILIES[family].fixed)


def named(modules, family="llada"):
    """Return the names of the layers that some patterns name."""
    return [x.name for x in adapted_layers(of(family), LoraSettings(rank=1, modules=modules))]


def blocks(family):
    """Return the names of the linear layers of the blocks."""
    return {f"{STARTS[family]}{number}.{end}" for number in range(2) for end in NAMES[family]}


def test_every_family_is_here():
    assert NAMES.keys() == {name for name in FAMILIES if not name.endswith("moe")}


@pytest.mark.parametrize("family", NAMES)
def test_all_linear_layers_of_the_blocks_are_the_usual_ones(family):
    assert set(named(None, family)) == blocks(family) and len(named(None, family)) == 14
    layers = linear_layers(of(family))
    assert {layer.name for layer in layers} == blocks(family) | {HEADS[family]}
    assert [layer.is_head for layer in layers] == [False] * 14 + [True]
    shapes = hf_shapes(of(family))
    assert all((x.outputs, x.inputs) == shapes[f"{x.name}.weight"] for x in layers)
    by_inputs = {x.name.rpartition(".")[2] for x in layers if x.is_split_by_inputs}
    assert by_inputs == {"attn_out", "ff_out"} if family == "llada" else {"o_proj", "down_proj"}


def test_a_pattern_is_a_name_its_end_or_has_stars():
    block = "model.transformer.blocks."
    assert named(["q_proj"]) == [f"{block}{i}.q_proj" for i in range(2)]
    assert named(["1.q_proj"]) == named([f"{block}1.q_proj"]) == [f"{block}1.q_proj"]
    assert len(named(["blocks.0.*"])) == 7
    assert set(named(["blocks.*.ff_out"])) == {f"{block}{i}.ff_out" for i in range(2)}
    assert named(["transformer.ff_out"]) == [HEADS["llada"]]
    assert set(named(["ff_out"])) == {*named(["blocks.*.ff_out"]), HEADS["llada"]}
    assert named(["up_proj", "k_proj"]) == named(["k_proj", "*.up_proj"])
    assert len(named(["*"])) == 15
    assert len(named(list(PUBLISHED))) == 15
    assert named(["lm_head"], "sdar") == ["lm_head"]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("o_proj", {"q_proj", "k_proj", "v_proj"}),
        ("layers.0.mlp.down_proj", {"q_proj", "k_proj", "v_proj"}),
        ("gate_proj", {"q_proj", "k_proj", "v_proj"}),
        ("ff_in", {"ff_out", "ff_proj"}),
    ],
)
def test_names_of_other_families_are_refused_with_the_nearest(wrong, nearest):
    """GDSD's recipe has the first three for LLaDA, where they would adapt nothing."""
    with pytest.raises(ValueError, match="lora.modules: ") as error:
        named(["q_proj", wrong])
    reason, _, fix = str(error.value).partition("; use ")
    assert reason == f"lora.modules: {wrong} names no linear layer of the llada family"
    assert set(fix.split(", ")[: len(nearest)]) == nearest
    assert set(fix.split(", ")) == {*PUBLISHED}


def test_an_end_starts_at_a_dot():
    with pytest.raises(ValueError, match="names no linear layer"):
        named(["_proj"])


@pytest.mark.parametrize("family", NAMES)
def test_embedding_and_head_can_be_trained_whole(family):
    lora = LoraSettings(rank=1, train_embedding=True)
    assert trained_whole(of(family), lora) == {
        "embedding.word_embeddings.weight": f"{EMBEDDINGS[family]}.weight"
    }
    lora = LoraSettings(rank=1, train_head=True)
    assert trained_whole(of(family), lora) == {"output_layer.weight": f"{HEADS[family]}.weight"}


def test_a_head_that_is_trained_whole_has_no_adapter():
    lora = LoraSettings(rank=1, modules=["ff_out"], train_head=True)
    with pytest.raises(ValueError, match=r"names the head model\.transformer\.ff_out, which"):
        adapted_layers(of("llada"), lora)
