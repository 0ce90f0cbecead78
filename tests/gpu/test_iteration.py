"""One iteration of AGRPO at LLaDA-8B's layer shapes: generated problems, random weights."""

import math

import pytest
import torch

from agrpo_megatron.scaling.memory import rank_memory
from agrpo_megatron.training.rl import collect_rollout, update_policy
from tests.gpu.common import (
    REHEARSES,
    WIDE,
    allocated,
    local,
    prepare,
    skip_unless_possible,
    te,
    weights_of,
)
from tests.training.tiny import open_session
from tools.gpu_model import free_memory, random_weights, scale_settings

pytestmark = pytest.mark.gpu

ITERATION = [
    f"model.num_layers={WIDE.layers}",
    f"model.hidden_size={WIDE.hidden}",
    f"model.ffn_hidden_size={WIDE.ffn}",
    f"model.num_attention_heads={WIDE.heads}",
    "model.num_query_groups=null",
    f"model.vocab_size={WIDE.vocab}",
    "model.max_sequence_length=512",
    f"model.init_std={WIDE.hidden**-0.5}",
    f"sampling.completion_length={WIDE.completion}",
    f"sampling.block_length={WIDE.completion}",
    f"sampling.denoising_steps={WIDE.steps // 2}",
    "sampling.top_k=150",
    "algorithm.prompts_per_iteration=4",
    "algorithm.group_size=4",
    "algorithm.mc_samples=4",
    "optimizer.learning_rate=1e-5",
    "train.token_budget=4096",
]


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [(local("bf16"), 0.2), (te("bf16"), 0.2), (te("fp8 blockwise"), 0.6)],
    ids=["local bf16", "te bf16", "te fp8"],
)
def test_one_iteration(overrides, limit, record_property, request):
    prepare()
    skip_unless_possible(scale_settings(WIDE, *overrides))
    free_memory()
    start = allocated()
    if not REHEARSES:
        torch.cuda.reset_peak_memory_stats()
    session, engine = open_session(
        *ITERATION, *overrides, fill=lambda n, s: random_weights(n, s.model, seed=0)
    )
    before = weights_of(engine.network)
    rollout, found = collect_rollout(session, engine, 0)
    assert len(rollout.rewards) == 16 and bool((rollout.advantages != 0).any())
    assert 0 < found["entropy"] < math.log(WIDE.vocab)
    metrics, tokens = update_policy(session, engine, rollout, None)
    values = [x for v in metrics.values() for x in (v if isinstance(v, list) else [v])]
    assert tokens > 0 and all(math.isfinite(x) for x in values if x is not None)
    case = request.node.callspec.id
    record_property(f"iteration/{case}/ratio, mean", metrics["ratio/mean"])
    record_property(f"iteration/{case}/ratio, largest error", metrics["ratio/max_error"])
    assert metrics["ratio/mean"] == pytest.approx(1.0, abs=0.02)
    assert metrics["ratio/max_error"] < limit
    assert metrics["grad_norm"] > 0
    after = weights_of(engine.network)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    again, _ = collect_rollout(session, engine, 1)
    assert len(again.rewards) == 16
    if not REHEARSES:
        peak = torch.cuda.max_memory_allocated() - start
        copies = sum(w.nbytes for w in (*before.values(), *after.values()))
        predicted = rank_memory(session.run.settings, 1, stage=0).total
        record_property(f"iteration/{case}/peak, of the prediction", (peak - copies) / predicted)
        assert peak - copies < 1.25 * predicted
    del engine, session, before, after
    free_memory()
