"""Adapters in an update: dropout, recomputation, and the reference policy."""

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.checkpoint.start import load_start_weights
from agrpo_megatron.megatron.engine import build_reference
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.training.rl import collect_rollout, update_policy
from tests.megatron.lora.whole import random_adapters, whole_adapters
from tests.ranks import run_ranks
from tests.training.tiny import open_session

ADAPTERS = ["lora.rank=3", "lora.alpha=6", "algorithm.baseline=none"]
RECOMPUTE = (
    "model.megatron={recompute_granularity: full, recompute_method: uniform, "
    "recompute_num_layers: 1}"
)


def _update(overrides):
    """Return the metrics of a first update, and the gradients of the adapters."""
    session, engine = open_session(*ADAPTERS, *overrides, world_size=dist.get_world_size())
    random_adapters(engine.network)
    engine.init_main_weights({})
    rollout, _ = collect_rollout(session, engine, 0)
    caught = {}

    def step():
        caught.update(whole_adapters(engine.network, lambda p: p.main_grad.clone()))
        return True, 0.0, None

    engine.optimizer.step = step
    metrics, _ = update_policy(session, engine, rollout, None)
    return metrics, caught


@pytest.mark.parametrize("layout", ["tp1", "tp2-sp"])
def test_recomputation_drops_the_same_inputs_again(layout):
    own = [f"parallel={layout}", "lora.dropout=0.5"]
    size = 2 if "2" in layout else 1
    kept, again, without = (
        run_ranks(size, _update, [*own, *more])[0] for more in ([], [RECOMPUTE], ["lora.dropout=0"])
    )
    for name, gradient in kept[1].items():
        assert torch.equal(again[1][name], gradient)
        assert float((without[1][name] - gradient).norm() / gradient.norm()) > 0.1
    assert without[0]["ratio/max_error"] < 1e-5 < kept[0]["ratio/max_error"]


def _ratios(_):
    """Return the first update's ratio error, by precision and by how rollouts apply adapters."""
    found = {}
    for precision in ("fp32", "bf16"):
        for merges in (False, True):
            own = [f"precision={precision}", f"lora.merge_rollouts={str(merges).lower()}"]
            found[precision, merges] = _update(own)[0]["ratio/max_error"]
    return found


def test_merged_rollouts_change_the_ratio_by_the_rounding_of_the_weights_and_others_not_at_all():
    [found] = run_ranks(1, _ratios, None)
    assert found["fp32", False] == found["bf16", False] == 0
    assert 0 < found["fp32", True] < 1e-5
    assert 1e-3 < found["bf16", True] < 1


def _kl(_):
    """Return the KL metric by both kinds of reference, and the loss with adapters on."""
    own = [*ADAPTERS, "algorithm.kl_coefficient=0.1", "optimizer.learning_rate=0"]
    session, engine = open_session(*own)
    random_adapters(engine.network)
    engine.init_main_weights({})
    settings = session.run.settings
    rollout, _ = collect_rollout(session, engine, 0)
    copy = build_network(settings, engine.ranks)
    load_start_weights(copy, settings)
    references = build_reference(settings, engine.network), copy
    assert references[0].adapters is engine.network.adapters
    return [update_policy(session, engine, rollout, each)[0] for each in references]


def test_the_reference_is_the_model_without_its_adapters():
    """It is no second copy, and has the KL of one whose adapters' product is zero."""
    own, copy = run_ranks(1, _kl, None)[0]
    assert own["kl"] > 0.01
    for name in ("kl", "loss", "ratio/max_error"):
        assert own[name] == pytest.approx(copy[name], rel=1e-6, abs=1e-9)
