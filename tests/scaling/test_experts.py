"""Layers with experts: parameters, FLOPs and memory, against Megatron's layers and by hand."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from agrpo_megatron.config.parallel import attention_cost, layer_stages
from agrpo_megatron.config.rules import validate_layout
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.platform import prepare_platform
from agrpo_megatron.scaling.flops import forward_cost, update_cost
from agrpo_megatron.scaling.memory import (
    fp8_parameters,
    rank_memory,
    stage_parameters,
    weight_spec,
)
from tests.ranks import run_ranks

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SDAR, MINI, FLASH = "sdar_30b", "llada2_mini", "llada2_flash"


def planned(name, *overrides):
    return load(Settings, EXAMPLES / name / "model.yaml", overrides)


# Published sizes.


def test_sdar_30b_has_the_published_number_of_parameters():
    """Source: total_size of the checkpoint's index, 61,064,245,248 bytes in bf16."""
    settings = planned(SDAR)
    counts = stage_parameters(weight_spec(settings), settings.parallel, stage=0)
    assert 2 * sum(counts) == 61_064_245_248
    assert counts[1] == 48 * 128 * 3 * 2048 * 768


def test_llada2_mini_has_the_published_number_of_parameters():
    """Source: total_size of the checkpoint's index, 32,511,286,784 bytes, biases in bf16 as well."""
    settings = planned(MINI)
    counts = stage_parameters(weight_spec(settings), settings.parallel, stage=0)
    biases = 19 * 256
    assert 2 * (sum(counts) + biases) == 32_511_286_784
    memory = rank_memory(settings, 1, stage=0)
    assert memory.weights == 2 * sum(counts) + 4 * biases, "biases stay in float32"


def test_llada2_flash_has_the_parameters_of_its_shapes():
    settings = planned(FLASH)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 512 + 2 * 4096 + 2 * 128
    dense, shared = 3 * 4096 * 9216, 3 * 4096 * 1024 + 256 * 4096
    outside = 2 * 157184 * 4096 + 4096 + 32 * layer + dense + 31 * shared
    counts = stage_parameters(weight_spec(settings), settings.parallel, stage=0)
    assert counts == (outside, 31 * 256 * 3 * 4096 * 1024)
    assert sum(counts) == 102_889_697_280


# FLOPs.


def test_a_token_of_sdar_30b_costs_its_router_and_eight_experts():
    """3.0 billion weights in matrices, and 0.3 billion each in the embedding and the head."""
    model = planned(SDAR).model
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512
    used = attention + 128 * 2048 + 8 * 3 * 2048 * 768
    cost = forward_cost(model)
    assert cost.token == 2 * 48 * used and cost.pair == 48 * 4 * 4096
    assert 48 * used + 2 * 151936 * 2048 == pytest.approx(3.35e9, rel=1e-2)
    assert update_cost(model).token == 3 * cost.token
    assert attention_cost(model) == 2 * 4096 / (used + 2 * 2048)


def test_first_layers_cost_their_swiglu_and_others_the_shared_expert_too():
    model = planned(MINI).model
    attention = 2 * 2048 * 2048 + 2 * 2048 * 512
    used = 20 * attention + 3 * 2048 * 5120 + 19 * (256 * 2048 + 9 * 3 * 2048 * 512)
    assert forward_cost(model).token == 2 * used
    assert attention_cost(model) == 20 * 2 * 2048 / (used + 20 * 2 * 2048)


# Memory, against Megatron's own layers and groups.

# Model, ranks, layout, and the sizes of tp, pp, ep and etp.
LAYOUTS = [
    (SDAR, 8, "ep8", (1, 1, 8, 1)),
    (SDAR, 32, "pp2-ep8", (1, 2, 8, 1)),
    (SDAR, 8, "tp2-sp-ep4", (2, 1, 4, 2)),
    (SDAR, 8, "tp2-sp-ep4-etp1", (2, 1, 4, 1)),
    (SDAR, 8, "tp2-sp-etp1", (2, 1, 1, 1)),
    (MINI, 8, "cp2-ep8", (1, 1, 8, 1)),
    (FLASH, 128, "pp4-ep16", (1, 4, 16, 1)),
    (FLASH, 128, "tp4-sp-pp2-ep8-etp1", (4, 2, 8, 1)),
    (FLASH, 128, "tp2-sp-pp4-ep16", (2, 4, 16, 2)),
]


def _expert_layer(model, sizes, context, rank, world):
    """Build Megatron's experts of one layer on a rank of a world of which there is no other.

    Returns weights outside the experts, weights of experts, bytes of biases, and how many ranks
    hold the same of the two.
    """
    tensor, pipeline, expert, split = sizes
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=split,
        create_gloo_process_groups=False,
    )
    moe = model.moe
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        num_moe_experts=moe.experts,
        moe_ffn_hidden_size=moe.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size,
        moe_router_topk=moe.topk,
        moe_router_score_function=moe.score,
        moe_router_enable_expert_bias=moe.expert_bias,
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        context_parallel_size=context,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=split,
        perform_initialization=False,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
    )
    spec = get_gpt_layer_local_spec(num_experts=moe.experts, moe_grouped_gemm=False)
    with torch.device("meta"):
        layer = spec.submodules.mlp(
            config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
        )
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    named = dict(layer.named_parameters())
    is_expert = {name: name.startswith("experts.") for name in named}
    if expert > 1 or split != tensor:
        assert all(getattr(p, "allreduce", True) != is_expert[n] for n, p in named.items())
    counts = [sum(p.numel() for n, p in named.items() if is_expert[n] == want) for want in (0, 1)]
    biases = sum(b.nbytes for name, b in layer.named_buffers() if name.endswith("expert_bias"))
    same = (
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        parallel_state.get_expert_data_parallel_world_size(),
    )
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return *counts, biases, same


def _expert_layers():
    dist.destroy_process_group()
    prepare_platform(1)
    found = []
    for name, world, layout, sizes in LAYOUTS:
        context = 2 if "cp2" in layout else 1
        model = planned(name).model
        found.append([_expert_layer(model, sizes, context, rank, world) for rank in (0, world - 1)])
    return found


@pytest.fixture(scope="module")
def expert_layers():
    return run_ranks(1, _expert_layers)[0]


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=lambda n: "-".join(LAYOUTS[n][::2][:2]))
def test_bytes_of_a_rank_are_those_of_megatrons_layers(expert_layers, number):
    """The first and the last rank; attention, norms and tables are written out here once more."""
    name, world, layout, (tensor, pipeline, _, _) = LAYOUTS[number]
    settings = planned(name, f"parallel={layout}")
    model = settings.model
    validate_layout(model, settings.parallel, world_size=world)
    layers = layer_stages(model, settings.parallel)
    hidden, width, keys = model.hidden_size, model.query_width, model.key_width
    attention = 2 * hidden * (width + keys) // tensor + 2 * hidden + 2 * 128
    table = model.vocab_size // tensor * hidden
    for stage, built in zip((0, pipeline - 1), expert_layers[number], strict=True):
        outside, experts, biases, (same, same_experts) = built
        mine = [n >= model.moe.dense_layers for n, place in enumerate(layers) if place == stage]
        count = len(mine) * attention + sum(mine) * outside
        count += (len(mine) - sum(mine)) * 3 * hidden * model.ffn_hidden_size // tensor
        count += table * (stage == 0) + (table + hidden) * (stage == pipeline - 1)
        memory = rank_memory(settings, world, stage=stage)
        assert memory.weights == 2 * (count + sum(mine) * experts) + sum(mine) * biases
        assert memory.gradients == 4 * (count + sum(mine) * experts)
        own = -(-count // same) + -(-sum(mine) * experts // same_experts)
        assert (memory.main_weights, memory.moments) == (4 * own, 8 * own)
        alone = planned(name, f"parallel={layout}", "optimizer.distributed=false")
        assert rank_memory(alone, world, stage=stage).moments == 2 * memory.gradients


def test_sdar_30b_on_eight_gpus_by_hand():
    """Each of eight GPUs has 16 experts of each layer, whose optimizer states nobody shares."""
    memory = rank_memory(planned(SDAR, "parallel=ep8"), 8, stage=0)
    experts = 48 * 16 * 3 * 2048 * 768
    others = 61_064_245_248 // 2 - 8 * experts
    assert (experts, others) == (3_623_878_656, 1_541_093_376)
    assert memory.weights == 2 * (experts + others)
    assert memory.moments == 8 * (experts + others // 8)
    shared = rank_memory(planned(SDAR, "parallel=ep8"), 32, stage=0)
    assert shared.weights == memory.weights
    assert shared.moments == 8 * (experts // 4 + others // 32)


def test_all_matrices_but_the_router_are_copied_in_fp8():
    given = ["precision=fp8", "fp8.bf16_last_layers=2", "parallel=tp2-sp-pp2-ep4-etp1"]
    settings = planned(MINI, *given)
    spec, parallel = weight_spec(settings), settings.parallel
    held = [fp8_parameters(spec, parallel, stage=stage) for stage in (0, 1)]
    attention = 2 * 2048 * (2048 + 512) // 2
    layer = attention + 3 * 2048 * 512 // 2 + 64 * 3 * 2048 * 512
    assert layer_stages(settings.model, parallel).count(0) == 10
    assert held == [attention + 3 * 2048 * 5120 // 2 + 9 * layer, 8 * layer]
    memory = rank_memory(settings, 8, stage=1)
    assert memory.fp8_copies == 2 * (held[1] + held[1] * 4 // 128**2)


def test_a_rollout_copy_has_its_own_experts():
    settings = planned(SDAR, "parallel=pp2-ep4", "rollout.parallel=ep8")
    copy = rank_memory(settings, 8, stage=0).rollout_copy
    assert copy == rank_memory(planned(SDAR, "parallel=ep8"), 8, stage=0).weights
    more = planned(SDAR, "parallel=ep8", "algorithm.kl_coefficient=0.1")
    assert rank_memory(more, 8, stage=0).reference == copy


# Activations.


def _activations(*overrides):
    settings = planned(SDAR, *overrides)
    scored = 3 * 151936 * (8192 // 2 // 2000)  # logits of one of 2000 steps
    memory = rank_memory(settings, 8, stage=0)
    return memory.activations // 2 - scored // settings.parallel.tensor


def test_experts_keep_their_inputs_and_four_products():
    """Per token and layer: residuals and inputs, attention, router, eight copies."""
    attention = 4 * (4096 + 512)
    layer = 4 * 2048 + attention + 3 * 128 + 8 * (2048 + 5 * 768)
    assert _activations("parallel=ep8") == 8192 * 48 * layer
    assert _activations("parallel=ep2") == 8192 * 48 * layer, "as many copies come as go"
    half = (4 * 2048 + attention) // 2 + (3 * 128 + 8 * (2048 + 5 * 768)) // 2
    assert _activations("parallel=tp2-sp-ep8-etp1") == 8192 * 48 * half
    whole = (4 * 2048 + attention) // 2 + (3 * 128 + 8 * (2 * 2048 + 5 * 768)) // 2
    assert _activations("parallel=tp2-sp-ep4") == 8192 * 48 * whole, "two ranks split each expert"
    full = "model.megatron={recompute_granularity: full}"
    assert _activations("parallel=ep8", full) == 8192 * (48 * 2048 + layer)
