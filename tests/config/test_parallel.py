"""Layouts: their text, and the split of the layers over the stages."""

from dataclasses import replace
from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrpo_megatron.config.parallel import _spread, data_ranks, layout_name, stage_layers
from agrpo_megatron.config.schema import build, from_text
from agrpo_megatron.config.settings import ModelSettings, MoeSettings, ParallelSettings

LLADA_8B = ModelSettings(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    vocab_size=126464,
)
SMALL = ModelSettings(num_layers=8, num_attention_heads=8, num_query_groups=4)
SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])
LAYOUTS = st.builds(
    ParallelSettings,
    tensor=SIZES,
    sequence=st.booleans(),
    pipeline=SIZES,
    virtual=st.integers(1, 4),
    layers=st.none() | st.lists(st.integers(0, 8), max_size=4),
    context=SIZES,
    data=st.none() | SIZES,
)
MODELS = st.builds(
    ModelSettings,
    num_layers=st.integers(1, 12),
    hidden_size=st.sampled_from([24, 48]),
    ffn_hidden_size=st.sampled_from([24, 36, 40]),
    num_attention_heads=st.just(12),
    num_query_groups=st.sampled_from([None, 1, 2, 3, 4, 6]),
    head_dim=st.sampled_from([None, 6]),
    vocab_size=st.none() | st.integers(2, 2000),
)


def parallel_of(text):
    return build(ParallelSettings, from_text(ParallelSettings, text, key="parallel"), "parallel.")


# The text.


def test_a_text_names_the_settings_it_sets():
    assert from_text(ParallelSettings, "dp2-vpp4-tp8-pp2-sp", key="parallel") == {
        "data": 2,
        "virtual": 4,
        "tensor": 8,
        "pipeline": 2,
        "sequence": True,
    }
    assert from_text(ParallelSettings, "cp16", key="parallel") == {"context": 16}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tp2-xx3", "'xx3'"),
        ("tp2-", "''"),
        ("", "''"),
        ("tp", "'tp'"),
        ("sp2", "'sp2'"),
        ("tp0", "'tp0'"),
        ("tp02", "'tp02'"),
        ("tp-2", "'tp'"),
        ("tp2 pp2", "'tp2 pp2'"),
        ("TP2", "'TP2'"),
        ("layers3", "'layers3'"),
        ("tp" + "9" * 5000, "'tp999"),
    ],
)
def test_a_wrong_text_names_its_key_and_the_part(text, part):
    with pytest.raises(ValueError, match="joined by -") as error:
        from_text(ParallelSettings, text, key="rollout.parallel")
    assert str(error.value).startswith(f"rollout.parallel={text}: {part}")


def test_a_part_is_written_once():
    with pytest.raises(ValueError, match="sp is written twice; write it once"):
        from_text(ParallelSettings, "sp-tp2-sp", key="parallel")


@pytest.mark.parametrize(
    ("text", "world_size", "name"),
    [
        ("tp1", 1, "tp1-pp1-cp1-dp1"),
        ("tp2", 8, "tp2-pp1-cp1-dp4"),
        ("cp2-vpp2-pp2-sp-tp2", 16, "tp2-sp-pp2-vpp2-cp2-dp2"),
        ("dp2-tp4", 8, "tp4-pp1-cp1-dp2"),
        ("pp4-vpp1", 4, "tp1-pp4-cp1-dp1"),
    ],
)
def test_a_layout_has_one_name(text, world_size, name):
    assert layout_name(parallel_of(text), world_size) == name
    assert data_ranks(parallel_of(text), world_size) == int(name.rpartition("dp")[2])


@given(LAYOUTS, SIZES)
def test_a_name_is_read_back_as_its_layout(layout, data):
    layout = replace(layout, layers=None, data=data)
    world_size = layout.tensor * layout.pipeline * layout.context * data
    name = layout_name(layout, world_size)
    assert parallel_of(name) == layout
    assert layout_name(replace(layout, data=None), world_size) == name


# The split.


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        # A layer has 218,112,000 weights, embedding and head 517,996,544 each: 2.37 layers.
        ("pp1", (32,)),
        ("pp2", (16, 16)),
        ("pp3", (10, 12, 10)),
        ("pp4", (7, 9, 9, 7)),
        ("pp8", (2, 5, 5, 5, 5, 4, 4, 2)),
        # Ranks hold 16 and 16, then 7, 9, 9 and 7 layers, as without virtual stages.
        ("pp2-vpp2", (7, 9, 9, 7)),
        ("pp4-vpp2", (2, 5, 5, 5, 5, 4, 4, 2)),
        ("pp4-vpp8", (1,) * 32),
    ],
)
def test_llada_8b_gives_the_ends_fewer_layers(layout, layers):
    assert stage_layers(LLADA_8B, parallel_of(layout)) == layers


def test_entries_stand_in_megatrons_order():
    """Entry v * pipeline + i: rank 0 holds entries 0, 2, 4 and rank 1 entries 1, 3, 5."""
    parallel = replace(parallel_of("pp2-vpp3"), layers=[1, 2, 1, 2, 1, 1])
    assert stage_layers(SMALL, parallel) == (1, 2, 1, 2, 1, 1)
    layers = stage_layers(replace(SMALL, num_layers=11), parallel_of("pp2-vpp3"))
    assert layers == (2, 2, 2, 2, 2, 1)
    assert (sum(layers[0::2]), sum(layers[1::2])) == (6, 5)


def test_without_a_vocabulary_only_layers_count():
    assert stage_layers(SMALL, parallel_of("pp4")) == (2, 2, 2, 2)
    assert stage_layers(replace(SMALL, num_layers=10), parallel_of("pp4")) == (2, 3, 3, 2)


def _greedy(count, held, *, layer, least):
    """Give equal layers one by one to the smallest place; the first and the last come after."""
    layers = [least] * len(held)

    def cost(place):
        return held[place] + layer * layers[place], place in (0, len(held) - 1), place

    for _ in range(count - sum(layers)):
        layers[min(range(len(held)), key=cost)] += 1
    return tuple(layers)


@given(
    st.integers(1, 9),
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(0, 12),
)
def test_equal_layers_go_to_the_smallest_place_one_by_one(layer, held, least, more):
    count = least * len(held) + more
    found = _spread((layer,) * count, tuple(held), least=least)
    assert found == _greedy(count, held, layer=layer, least=least)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.lists(st.integers(0, 30), min_size=1, max_size=4),
)
def test_unequal_layers_stay_in_order_and_make_the_largest_place_smallest(sizes, held):
    held = held[: len(sizes)]

    def places(counts):
        starts = [0, *accumulate(counts)]
        parts = [sizes[a:b] for a, b in pairwise(starts)]
        return sorted(
            (own + sum(part) for own, part in zip(held, parts, strict=True)), reverse=True
        )

    found = _spread(tuple(sizes), tuple(held), least=1)
    assert sum(found) == len(sizes) and min(found) >= 1
    every = combinations(range(1, len(sizes)), len(held) - 1)
    splits = [[b - a for a, b in pairwise([0, *cuts, len(sizes)])] for cuts in every]
    assert places(found) == min(places(split) for split in splits)


# SDAR-30B-A3B and LLaDA2.0-flash. Of a layer's weights, 18,874,368 and 50,331,648 are split by tp
# (attention, shared experts), 603,979,776 and 3,221,225,472 by ep (experts).
SDAR_30B = ModelSettings(
    num_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    num_query_groups=4,
    head_dim=128,
    vocab_size=151936,
    moe=MoeSettings(experts=128, topk=8, ffn_hidden_size=768),
)
FLASH = ModelSettings(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=9216,
    num_attention_heads=32,
    num_query_groups=4,
    vocab_size=157184,
    moe=MoeSettings(
        experts=256, topk=8, ffn_hidden_size=1024, shared_ffn_hidden_size=1024, dense_layers=1
    ),
)


@pytest.mark.parametrize(
    ("model", "layout", "layers"),
    [
        # Embedding and head are half a layer each; 3.3 if eight ranks share the experts.
        (SDAR_30B, "pp4", (12, 12, 12, 12)),
        (SDAR_30B, "pp4-ep8", (10, 14, 14, 10)),
        (SDAR_30B, "tp2-sp-pp4-ep4-etp2", (11, 13, 13, 11)),
        (SDAR_30B, "tp2-sp-pp4-ep4", (12, 12, 12, 12)),
        # The first layer has no experts: the embedding costs its stage no layer.
        (FLASH, "pp4", (8, 8, 8, 8)),
        (FLASH, "tp4-sp-pp2-ep8", (16, 16)),
        (FLASH, "pp4-ep16", (7, 9, 9, 7)),
        (FLASH, "pp5", (7, 7, 6, 6, 6)),
        (FLASH, "pp2-vpp2", (8, 8, 8, 8)),
    ],
)
def test_experts_count_as_far_as_a_rank_holds_them(model, layout, layers):
    assert stage_layers(model, parallel_of(layout)) == layers


def _largest(model, layers):
    """Return the parameters of the largest place; written out here a second time on purpose."""
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    attention = model.hidden_size * (2 * heads + 2 * groups) * head
    swiglu = 3 * model.hidden_size * model.ffn_hidden_size
    layer = attention + swiglu + 2 * model.hidden_size
    held = [layer * count for count in layers]
    for end in (0, -1):
        held[end] += (model.vocab_size or 0) * model.hidden_size
    return max(held)


@given(MODELS, st.integers(1, 5))
def test_no_split_has_a_smaller_largest_stage(model, stages):
    stages = min(stages, model.num_layers)
    every = []
    for cuts in combinations(range(1, model.num_layers), stages - 1):
        ends = [0, *cuts, model.num_layers]
        every.append([b - a for a, b in zip(ends, ends[1:], strict=False)])
    layers = stage_layers(model, ParallelSettings(pipeline=stages))
    assert sum(layers) == model.num_layers and min(layers) >= 1
    assert _largest(model, layers) == min(_largest(model, split) for split in every)


@given(MODELS, st.integers(2, 4), st.integers(2, 3))
def test_virtual_stages_balance_ranks_first(model, ranks, chunks):
    model = replace(model, num_layers=model.num_layers + ranks * chunks)
    layers = stage_layers(model, ParallelSettings(pipeline=ranks, virtual=chunks))
    assert len(layers) == ranks * chunks
    assert sum(layers) == model.num_layers and min(layers) >= 1
    totals = [sum(layers[rank::ranks]) for rank in range(ranks)]
    best = stage_layers(model, ParallelSettings(pipeline=ranks))
    if min(best) >= chunks:
        assert _largest(model, totals) == _largest(model, best)
    for rank in range(1, ranks - 1):
        assert max(layers[rank::ranks]) - min(layers[rank::ranks]) <= 1
