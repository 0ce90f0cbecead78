"""The memory arithmetic against the bytes that built models, buffers and optimizers hold."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.parallel import start_ranks
from agrpo_megatron.scaling.memory import PARTS, rank_memory, worst_rank
from agrpo_megatron.scaling.parameters import fp8_parameters, stage_parameters, weight_spec
from agrpo_megatron.training.rl import collect_rollout, update_policy
from tests.ranks import run_ranks
from tests.training.tiny import open_session

ROOT = Path(__file__).parent.parent.parent
LLADA = ROOT / "examples" / "llada_8b" / "model.yaml"
LAYOUTS = ["tp8", "tp4-sp-pp2", "pp4-dp2", "pp4-vpp2-dp2", "tp2-cp2-dp2", "tp2-pp2-dp2"]
# SDAR-4B, whose heads of 128 are together wider than its residual stream.
WIDE_HEADS = [
    *("model.num_layers=36", "model.hidden_size=2560", "model.ffn_hidden_size=9728"),
    *("model.head_dim=128", "model.num_query_groups=8", "model.qk_norm=true"),
    "model.vocab_size=151936",
]
TIED = ["model.family=qwen3", "model.qk_norm=true", "model.tie_embeddings=true"]
PADDING = 256  # numbers that Megatron may add to a buffer at its end and between parameters


def _on_meta(cases):
    """Build this rank of each layout without memory; return bytes held and predicted."""
    found = []
    for layout, overrides in cases:
        settings = load(Settings, LLADA, [f"parallel={layout}", "run.threads=1", *overrides])
        ranks = start_ranks(settings)
        with torch.device("meta"):
            network = build_network(settings, ranks)
        held = sum(p.numel() * p.element_size() for _, p in network.named_parameters())
        assert all(p.is_meta for _, p in network.named_parameters())
        predicted = rank_memory(settings, dist.get_world_size(), stage=ranks.pipeline.rank)
        found.append((layout, held, predicted.weights))
    return found


def test_weights_are_those_of_the_built_model():
    """LLaDA-8B; SDAR-4B, also with biases; tied heads, of which a pipeline has two copies."""
    cases = [(layout, []) for layout in LAYOUTS]
    cases += [("tp8", TIED), ("tp2-pp4-vpp2", TIED)]
    cases += [("tp4-sp-pp2", WIDE_HEADS), ("tp2-pp4-vpp2", [*WIDE_HEADS, "model.qkv_bias=true"])]
    for result in run_ranks(8, _on_meta, cases):
        assert [held for _, held, _ in result] == [predicted for _, _, predicted in result], result


def test_llada_8b_has_the_published_number_of_parameters():
    """Source: total_size of the checkpoint's index, 16,031,162,368 bytes in bf16."""
    settings = load(Settings, LLADA)
    counts = stage_parameters(weight_spec(settings), settings.parallel, stage=0)
    assert (2 * counts[0], counts[1]) == (16_031_162_368, 0)


def test_sdar_4b_has_the_published_number_of_parameters():
    """Source: total_size of the checkpoint's index, 8,822,848,512 bytes in bf16."""
    settings = load(Settings, LLADA, WIDE_HEADS)
    counts = stage_parameters(weight_spec(settings), settings.parallel, stage=0)
    assert (2 * counts[0], counts[1]) == (8_822_848_512, 0)


def _state_bytes(optimizer):
    """Return the bytes of Adam's moments on this rank."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    states = [s for part in parts for s in part.optimizer.state.values()]
    names = ("exp_avg", "exp_avg_sq")
    return sum(s[n].numel() * s[n].element_size() for s in states for n in names)


def _tiny(overrides):
    """Train one iteration; return bytes held, by part, and the arithmetic."""
    options = ["model.num_layers=4", "model.hidden_size=64", "model.ffn_hidden_size=128"]
    session, engine = open_session(*options, *overrides, world_size=dist.get_world_size())
    rollout, _ = collect_rollout(session, engine, 0)
    update_policy(session, engine, rollout, None)
    named = list(engine.network.named_parameters())
    trained = [p for _, p in engine.network.trained_parameters()]
    main = [p for g in engine.optimizer.param_groups for p in g["params"]]
    held = {
        "weights": sum(p.numel() * p.element_size() for _, p in named),
        "gradients": sum(b.grad_data.nbytes for ddp in engine.ddp for b in ddp.buffers),
        "main_grads": sum(p.main_grad.nbytes for p in trained),
        "main_weights": sum(p.numel() * 4 for p in main),
        "moments": _state_bytes(engine.optimizer),
        "tensors": len(trained),
    }
    stage, settings = engine.ranks.pipeline.rank, session.run.settings
    predicted = rank_memory(settings, dist.get_world_size(), stage=stage)
    if settings.lora.merge_rollouts:  # without activations, nothing makes room for the copy
        settings = replace(settings, train=replace(settings.train, token_budget=0))
        without = rank_memory(settings, dist.get_world_size(), stage=stage)
        assert without.unmerged > predicted.unmerged == 0
        engine.network.for_rollouts()
        kept = engine.network.adapters._kept.values()
        assert sum(weight.nbytes for weight in kept) == without.unmerged
    return held, predicted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", ["false", "true"])
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_gradients_and_optimizer_states_are_those_of_a_trained_engine(
    layout, distributed, precision
):
    overrides = [f"parallel={layout}", f"optimizer.distributed={distributed}"]
    overrides.append(f"precision={precision}")
    results = run_ranks(2, _tiny, overrides)
    for held, predicted in results:
        slack = held["tensors"] * PADDING * 4
        assert held["weights"] == predicted.weights
        assert 0 <= held["gradients"] - predicted.gradients <= slack
        if precision == "bf16" and layout != "dp2":
            assert abs(held["main_weights"] - predicted.main_weights) <= slack
        if layout != "dp2":
            assert held["moments"] == predicted.moments
    if layout == "dp2":  # the optimizer may cut the buffer anywhere: together it is right
        total = sum(held["moments"] for held, _ in results)
        assert total == sum(predicted.moments for _, predicted in results)


LORA = "lora.rank=4"
ALL_LAYERS = "lora.modules=[q_proj, k_proj, v_proj, attn_out, ff_proj, up_proj, ff_out]"
ADAPTERS = {
    "blocks": [LORA],
    "head too": [LORA, ALL_LAYERS],
    "some, and whole tables": [
        *(LORA, "lora.modules=[k_proj, blocks.*.ff_out]"),
        *("lora.train_embedding=true", "lora.train_head=true", "lora.merge_rollouts=true"),
    ],
}


def _with_adapters(layouts):
    """Train one iteration at each layout, precision and choice of adapters."""
    cases = [
        (layout, precision, name)
        for layout in layouts
        for precision in ("fp32", "bf16")
        for name in (ADAPTERS if precision == "bf16" else ["head too"])
    ]
    found = {}
    for layout, precision, name in cases:
        given = [f"parallel={layout}", "optimizer.distributed=true", f"precision={precision}"]
        found[layout, precision, name] = _tiny([*given, *ADAPTERS[name]])
    return found


def _check_trained(precision, ranks):
    """Check gradients of each rank, and states of all together: their cuts may be anywhere."""
    for held, predicted in ranks:
        assert held["weights"] == predicted.weights
        assert held["main_grads"] == predicted.gradients
        slack = held["tensors"] * PADDING * 4
        assert 0 <= held["gradients"] - predicted.gradients <= slack
        assert predicted.reference == predicted.unmerged == 0
    sums = {
        part: [sum(held[part] for held, _ in ranks), sum(getattr(p, part) for _, p in ranks)]
        for part in ("main_weights", "moments")
    }
    assert sums["moments"][0] == sums["moments"][1] > 0
    if precision == "bf16":
        assert sums["main_weights"][0] == sums["main_weights"][1]


def test_adapters_are_all_that_has_gradients_and_optimizer_states():
    for results in (
        run_ranks(1, _with_adapters, ["tp1"]),
        run_ranks(2, _with_adapters, ["tp2-sp", "pp2", "dp2"]),
    ):
        for case in results[0]:
            layout, precision, _ = case
            ranks = [result[case] for result in results]
            groups = [ranks] if layout == "dp2" else [[rank] for rank in ranks]
            for group in groups:
                _check_trained(precision, group)


WEIGHTS = 8_015_581_184  # of LLaDA-8B
IN_LAYERS = 6_979_321_856  # of them in the layers' matrices: 32 x 4096 x (4 x 4096 + 3 x 12288)


@pytest.mark.parametrize(
    ("overrides", "gradients", "main_weights", "moments", "host"),
    [
        ([], 4, 4, 8, 0),
        (["moments=bf16"], 4, 2, 4, 0),
        (["moments=fp8"], 4, 2, 4, 0),
        (["main_gradients=bf16"], 2, 2, 8, 0),
        (["moments=bf16", "main_gradients=bf16"], 2, 2, 4, 0),
        (["offload=1"], 4, 0, 0, 16),
        (["offload=0.5"], 4, 2, 4, 8),
    ],
)
def test_states_of_the_optimizer_take_as_many_bytes_as_their_settings_say(
    overrides, gradients, main_weights, moments, host
):
    given = ["parallel=dp8", *(f"optimizer.{override}" for override in overrides)]
    memory, own = rank_memory(load(Settings, LLADA, given), 8, stage=0), WEIGHTS // 8
    assert memory.weights == 2 * WEIGHTS and memory.gradients == gradients * WEIGHTS
    assert (memory.main_weights, memory.moments) == (main_weights * own, moments * own)
    assert memory.host == host * own
    assert memory.total == sum(getattr(memory, part) for part in PARTS) and "host" not in PARTS


def test_weights_in_fp8_are_held_along_rows_and_along_columns():
    bf16 = rank_memory(load(Settings, LLADA, ["parallel=dp8"]), 8, stage=0)
    given = ["parallel=dp8", "precision=fp8", "optimizer.moments=bf16"]
    copied = rank_memory(load(Settings, LLADA, given), 8, stage=0)
    scales = 2 * 4 * IN_LAYERS // 128**2
    assert copied.weights == 2 * WEIGHTS and bf16.fp8_copies == 0
    assert copied.fp8_copies == 2 * IN_LAYERS + scales
    assert copied.main_weights == 2 * WEIGHTS // 8
    primary = rank_memory(load(Settings, LLADA, [*given, "fp8.primary_weights=true"]), 8, stage=0)
    assert primary.weights == 2 * (WEIGHTS - IN_LAYERS) + 2 * IN_LAYERS + scales
    assert primary.fp8_copies == 0 and primary.main_weights == 4 * WEIGHTS // 8
    mxfp8 = rank_memory(load(Settings, LLADA, [*given, "fp8.recipe=mxfp8"]), 8, stage=0)
    assert mxfp8.fp8_copies == 2 * IN_LAYERS + 2 * IN_LAYERS // 32


def test_layers_that_stay_bf16_are_not_copied_wherever_they_are():
    given = ["precision=fp8", "fp8.bf16_first_layers=3", "fp8.bf16_last_layers=1"]
    layer = IN_LAYERS // 32
    stages = {
        "dp8": [28],
        "pp2": [13, 15],  # of 16 layers each
        "pp2-vpp2": [13, 15],
        "tp2-pp4-dp1": [4, 9, 9, 6],  # of 7, 9, 9 and 7
    }
    for layout, counts in stages.items():
        settings = load(Settings, LLADA, [*given, f"parallel={layout}"])
        parallel, spec = settings.parallel, weight_spec(settings)
        held = [fp8_parameters(spec, parallel, stage=s) for s in range(parallel.pipeline)]
        assert held == [count * layer // parallel.tensor for count in counts], layout


def test_a_supervised_phase_scores_half_of_each_completion():
    given = ["parallel=dp8", "train.token_budget=8192"]
    settings = [load(Settings, LLADA, [*given, *more]) for more in ([], ["sft.iterations=1"])]
    found = [rank_memory(one, 8, stage=0) for one in settings]
    without, with_sft = (memory.activations + memory.logits for memory in found)
    fixed = 8192 // 2 // 128  # of as long a prompt and completion, in one of 128 steps
    # Logits (bf16, three times float32), the end of the last layer, the norm before the head.
    each = 7 * settings[0].model.vocab_size + 2 * 4096 + 4 * 12288 + 2 * 4096
    assert with_sft - without == 2 * each * (8192 // 4 - fixed)


def test_a_rollout_layout_of_its_own_has_copies_in_one_direction():
    given = ["precision=fp8", "parallel=dp8", "rollout.parallel=tp2"]
    memory = rank_memory(load(Settings, LLADA, given), 8, stage=0)
    one_direction = IN_LAYERS // 2 + 4 * (IN_LAYERS // 2) // 128**2
    assert memory.rollout_copy == WEIGHTS + 4096 * 65 + one_direction


def test_a_reference_is_a_second_model_but_for_adapters():
    given = ["parallel=tp2", "algorithm.kl_coefficient=0.1"]
    bf16 = rank_memory(load(Settings, LLADA, given), 8, stage=0)
    assert bf16.reference == bf16.weights == WEIGHTS + 4096 * 65
    fp8 = rank_memory(load(Settings, LLADA, [*given, "precision=fp8"]), 8, stage=0)
    assert fp8.reference == fp8.weights + fp8.fp8_copies // 2
    assert rank_memory(load(Settings, LLADA, [*given, "lora.rank=64"]), 8, stage=0).reference == 0
    pairs = ["parallel=tp2", "sft.loss=vrpo", "sft.data=pairs.jsonl", "sft.iterations=1"]
    assert rank_memory(load(Settings, LLADA, pairs), 8, stage=0).reference == bf16.reference


def test_adapters_of_the_published_run():
    """Rank 64 on the seven linear layers of 32 blocks, and on the head, which is named alike."""
    blocks = 64 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 12288))
    head = 64 * (4096 + 126464)
    rank = ["parallel=dp8", "lora.rank=64"]
    memory = rank_memory(load(Settings, LLADA, rank), 8, stage=0)
    assert memory.gradients == 4 * blocks and memory.weights == 2 * (WEIGHTS + blocks)
    with_head = rank_memory(load(Settings, LLADA, [*rank, ALL_LAYERS]), 8, stage=0)
    assert with_head.gradients == 4 * (blocks + head) == 4 * 176_128_000
    assert with_head.moments == 8 * (blocks + head) // 8
    merged = [*rank, "lora.merge_rollouts=true", "train.token_budget=1024"]
    merging = rank_memory(load(Settings, LLADA, merged), 8, stage=0)
    room = merging.activations + merging.logits
    assert merging.unmerged == 2 * IN_LAYERS - room > 0
    in_tp2 = rank_memory(load(Settings, LLADA, [*merged, "rollout.parallel=tp2"]), 8, stage=0)
    assert in_tp2.unmerged == IN_LAYERS, "a copy that stays merged in updates"


def test_the_worst_rank_is_the_worst_of_all_stages():
    settings = load(Settings, LLADA, ["parallel=pp4"])
    totals = [rank_memory(settings, 8, stage=stage).total for stage in range(4)]
    assert worst_rank(settings, 8).total == max(totals) > min(totals)


def test_a_rollout_layout_of_its_own_holds_a_second_set_of_weights():
    settings = load(Settings, LLADA, ["parallel=pp4", "rollout.parallel=tp4"])
    memory = rank_memory(settings, 8, stage=1)
    whole = replace(settings, rollout=replace(settings.rollout, parallel=None))
    assert memory.rollout_copy == pytest.approx(16_031_162_368 / 4, rel=1e-3)
    assert rank_memory(whole, 8, stage=1).rollout_copy == 0


def _tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "layouts.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )


def test_the_tool_prints_a_row_for_each_layout():
    done = _tool(str(LLADA), "--ranks", "8", "--memory", "80")
    rows = [line.split() for line in done.stdout.splitlines() if line.lstrip().startswith("tp")]
    assert done.returncode == 0 and len(rows) == 20
    settings = load(Settings, LLADA, ["parallel=tp4-sp-pp2"])
    (row,) = [row for row in rows if row[0] == "tp4-sp-pp2-cp1-dp1"]
    assert row[7] == f"{worst_rank(settings, 8).total / 2**30:.1f}" and row[8] == "fits"
    assert "rollout copy" not in done.stdout and "host" not in done.stdout


def test_the_tool_shows_what_settings_add_and_move():
    done = _tool(str(LLADA), "--parallel", "dp8", "precision=fp8", "optimizer.offload=1")
    names, _, row = (line.split() for line in done.stdout.splitlines() if line.strip())
    shown = "layout weights fp8 copies gradients activations logits total host"
    assert " ".join(names).startswith(shown)
    assert row[2:4] == ["13.0", "29.9"] and row[7] == "14.9"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        ([str(LLADA), "--parallel", "tp3"], "the nearest layout that fits"),
        ([str(ROOT / "examples" / "tiny.yaml")], "model.vocab_size"),
    ],
)
def test_wrong_input_is_one_line(arguments, said):
    done = _tool(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("layouts: error: ")
    assert done.stderr.count("\n") == 1 and said in done.stderr


def test_a_rollouts_cache_uses_the_room_of_activations():
    """One GiB of keys and values: what the activations of an update leave of it is counted."""
    own = ["model.attention=block_causal", "model.block_length=4", "sampling.block_length=4"]
    own += ["rollout.cache_memory=1", "train.token_budget=4096", "model.vocab_size=1000"]
    small = rank_memory(load(Settings, None, own), 1, stage=0)
    room = small.activations + small.logits
    assert room > 0 and small.rollout_cache == 2**30 - room
    large = load(Settings, None, [*own, "rollout.cache_memory=1e-6"])
    assert rank_memory(large, 1, stage=0).rollout_cache == 0
    full = [*own, "model.attention=full", "model.block_length=null", "sampling.policy=cached"]
    cached = rank_memory(load(Settings, None, full), 1, stage=0)
    assert cached.rollout_cache == small.rollout_cache
    uncached = load(Settings, None, [*own, "rollout.cached=false"])
    assert rank_memory(uncached, 1, stage=0).rollout_cache == 0


@pytest.mark.parametrize(("mode", "freed"), [("none", 0), ("gradients", 4), ("optimizer", 16)])
def test_released_memory_is_room_for_a_rollouts_cache(mode, freed):
    given = ["model.attention=block_causal", "model.block_length=32", "rollout.cache_memory=200"]
    settings = load(Settings, LLADA, ["parallel=dp8", *given, f"rollout.release={mode}"])
    memory = rank_memory(settings, 8, stage=0)
    own = WEIGHTS // 8
    away = {0: 0, 4: 4 * WEIGHTS, 16: 4 * WEIGHTS + 12 * own}[freed]
    assert memory.rollout_cache == 200 * 2**30 - memory.activations - memory.logits - away
    assert memory.host == (12 * own if mode == "optimizer" else 0)
    assert (memory.gradients, memory.main_weights, memory.moments) == (
        4 * WEIGHTS,
        4 * own,
        8 * own,
    )
