"""Layers with experts: parameters, FLOPs and memory, against built models and by hand."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from agrpo_megatron.config.parallel import attention_cost, layer_stages
from agrpo_megatron.config.rules import validate_layout
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.parallel import Axis, Ranks
from agrpo_megatron.megatron.platform import prepare_platform
from agrpo_megatron.scaling.flops import forward_cost, update_cost
from agrpo_megatron.scaling.memory import rank_memory, worst_rank
from agrpo_megatron.scaling.parameters import (
    fp8_parameters,
    stage_parameters,
    trained_parameters,
    weight_spec,
)
from tests.ranks import run_ranks
from tests.scaling.test_memory import _tiny, _tool

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
    """Source: total_size of the checkpoint's index, 32,511,286,784 bytes, with biases in bf16."""
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


# Memory, against built models and Megatron's groups.

LAYOUTS = [
    (SDAR, 8, "ep8"),
    (SDAR, 32, "pp2-ep8"),
    (SDAR, 8, "tp2-sp-ep4-etp2"),
    (SDAR, 8, "tp2-sp-ep4"),
    (MINI, 8, "cp2-ep8"),
    (FLASH, 128, "pp4-ep16"),
    (FLASH, 128, "tp4-sp-pp2-ep8"),
    (FLASH, 128, "tp2-sp-pp4-ep16-etp2"),
]


def _rank_alone(settings, rank, world):
    """Return a rank's place in a world of which there is no other rank."""
    parallel = settings.parallel
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    names = {
        "tensor": groups.tp,
        "pipeline": groups.pp,
        "context": groups.cp,
        "data": groups.dp,
        "data_context": groups.dp_cp,
        "expert": groups.ep,
        "expert_tensor": groups.expt_tp,
    }
    axes = {name: Axis(group, group.rank(), group.size()) for name, group in names.items()}
    device = torch.device("cpu")
    return Ranks(rank, world, device, parallel, groups, replica=None, **axes)


def built(settings, world, stage):
    """Build a rank of a stage without memory; return bytes held and predicted, by part.

    Called after `prepare_platform`, without a process group.
    """
    validate_layout(settings.model, settings.parallel, world_size=world)
    last = (stage + 1) * world // settings.parallel.pipeline - 1
    ranks = _rank_alone(settings, last, world)
    assert ranks.pipeline.rank == stage
    with torch.device("meta"):
        network = build_network(settings, ranks)
    counts = {True: 0, False: 0}  # of parameters, whether Megatron reduces them like all others
    for _, parameter in network.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.is_meta
        counts[getattr(parameter, "allreduce", True)] += parameter.numel()
    shares = -(-counts[True] // ranks.data_context.size)
    shares += -(-counts[False] // parallel_state.get_expert_data_parallel_world_size())
    predicted = rank_memory(settings, world, stage=stage)
    held = {
        "weights": sum(tensor.nbytes for _, tensor in network.named_weights()),
        "gradients": 4 * sum(counts.values()),
        "main_weights": 4 * shares,
        "moments": 8 * shares,
    }
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return held, {part: getattr(predicted, part) for part in held}


def _all_built():
    dist.destroy_process_group()
    prepare_platform(1)
    found = {}
    for name, world, layout in LAYOUTS:
        settings = planned(name, f"parallel={layout}", "run.threads=1")
        for stage in {0, settings.parallel.pipeline - 1}:
            found[name, layout, stage] = built(settings, world, stage)
    return found


def test_bytes_of_a_rank_are_those_of_the_built_model():
    """The first and the last stage, on the meta device."""
    found = run_ranks(1, _all_built, timeout=240)[0]
    assert len(found) == 12
    for case, (held, predicted) in found.items():
        assert held == predicted, case


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
    given = ["precision=fp8", "fp8.bf16_last_layers=2", "parallel=tp2-sp-pp2-ep4"]
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
    """Return the numbers that layers keep, without the norm before the head."""
    settings = planned(SDAR, *overrides)
    memory, parallel = rank_memory(settings, 8, stage=0), settings.parallel
    assert memory.logits == (2 + 3 * 4) * 151936 * (8192 // 2 // 2000) // parallel.tensor
    return memory.activations // 2 - 8192 * 2 * 2048 // parallel.tensor


def test_experts_keep_their_inputs_and_four_products():
    """Per token and layer: residuals and inputs, attention, router, eight copies."""
    attention = 4 * (4096 + 512)
    layer = 4 * 2048 + attention + 3 * 128 + 8 * (2048 + 5 * 768)
    assert _activations("parallel=ep8") == 8192 * 48 * layer
    assert _activations("parallel=ep2") == 8192 * 48 * layer, "as many copies come as go"
    half = (4 * 2048 + attention) // 2 + (3 * 128 + 8 * (2048 + 5 * 768)) // 2
    assert _activations("parallel=tp2-sp-ep8") == 8192 * 48 * half
    whole = (4 * 2048 + attention) // 2 + (3 * 128 + 8 * (2 * 2048 + 5 * 768)) // 2
    assert _activations("parallel=tp2-sp-ep4-etp2") == 8192 * 48 * whole, (
        "two ranks split each expert"
    )
    full = "model.megatron={recompute_granularity: full}"
    gradients = 2048 + 8 * (2 * 2048 + 768)
    logits = (2 + 3 * 4) * 151936 * (8192 // 2 // 2000) // 2
    assert _activations("parallel=ep8", full) == 8192 * (48 * 2048 + layer + gradients) - logits, (
        "the last layer is computed again in the room of the logits"
    )


def test_the_tool_lists_layouts_of_experts():
    done = _tool("examples/sdar_30b/model.yaml", "--ranks", "8")
    rows = {
        row[0]: row for line in done.stdout.splitlines() if "-dp" in line and (row := line.split())
    }
    assert done.returncode == 0
    assert {"tp1-pp1-cp1-ep8-dp8", "tp2-sp-pp1-cp1-ep4-dp4", "tp1-pp1-cp1-dp8"} <= rows.keys()
    name = "tp2-sp-pp1-cp1-ep4-etp2-dp4"
    memory = worst_rank(planned(SDAR, f"parallel={name}"), 8)
    assert rows[name][-3] == f"{memory.total / 2**30:.1f}"
    assert not any("tp8" in name or "ep3-" in name for name in rows)
    dense = _tool("examples/sdar_8b/model.yaml", "--ranks", "8")
    assert "tp2-sp-pp1-cp1-dp4" in dense.stdout and "ep" not in dense.stdout


TINY = ["model.family=llada_moe", "model.moe.experts=4", "model.moe.ffn_hidden_size=24"]
KINDS = ["model.moe.shared_ffn_hidden_size=96", "model.moe.dense_layers=1"]
KINDS += ["model.moe.score=sigmoid", "model.moe.expert_bias=true"]


def _trained(layouts):
    given = ["optimizer.distributed=true", "precision=bf16", *TINY, *KINDS]
    return {layout: _tiny([f"parallel={layout}", *given]) for layout in layouts}


def test_bytes_with_experts_are_those_of_trained_engines():
    """Three layers of experts after a first without."""
    layouts = ["tp2-sp", "pp2", "dp2", "ep2", "tp2-sp-etp2", "tp2-sp-ep2"]
    ranks = run_ranks(2, _trained, layouts)
    for layout in layouts:
        results = [rank[layout] for rank in ranks]
        assert all(held["main_grads"] == predicted.gradients for held, predicted in results)
        biases = sum(predicted.weights - held["weights"] for held, predicted in results)
        assert biases == 4 * 4 * 3 * (1 if layout == "pp2" else 2), layout
        for part in ("main_weights", "moments"):
            total = sum(held[part] for held, _ in results)
            assert total == sum(getattr(predicted, part) for _, predicted in results) > 0, layout


# Adapters.

LORA = ["lora.rank=4", "precision=bf16", "optimizer.distributed=true"]
SOME = "lora.modules=[experts.3.*, o_proj, shared_expert.down_proj]"


def _with_adapters(layouts):
    given = [*LORA, *TINY, *KINDS]
    merged = "lora.merge_rollouts=true"
    found = {layout: _tiny([*given, f"parallel={layout}", merged]) for layout in layouts}
    return found, _tiny([*given, "parallel=ep2", SOME])


def test_bytes_with_adapted_experts_are_those_of_trained_engines():
    """Where one expert is adapted, they are those of its rank."""
    layouts = ["tp2-sp", "pp2", "ep2", "tp2-sp-etp2", "tp2-sp-ep2"]
    ranks = run_ranks(2, _with_adapters, layouts)
    for layout in layouts:
        results = [rank[layout] for rank, _ in ranks]
        assert all(held["main_grads"] == predicted.gradients for held, predicted in results)
        for part in ("main_weights", "moments"):
            total = sum(held[part] for held, _ in results)
            assert total == sum(getattr(predicted, part) for _, predicted in results) > 0, layout
    (_, (first, predicted)), (_, (last, _)) = ranks
    assert first["main_grads"] < last["main_grads"] == predicted.gradients


def test_adapters_on_experts_of_sdar_30b_by_hand():
    settings = planned(SDAR, "parallel=ep8", "lora.rank=16")
    expert = 3 * 16 * (2048 + 768)
    attention = 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    counts = trained_parameters(weight_spec(settings), settings.parallel, stage=0)
    assert counts == (48 * attention, 48 * 16 * expert)
    model, lora = settings.model, settings.lora
    token = 2 * 48 * (attention + 8 * expert)
    assert forward_cost(model, lora).token - forward_cost(model).token == token
