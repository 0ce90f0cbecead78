"""Experts are balanced in the supervised phase, where that is asked for, and nowhere else."""

import torch

from agrpo_megatron.megatron.engine import build_engine
from agrpo_megatron.megatron.weights import initialise
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.training.sft import run_sft, with_balance
from tests.ranks import run_ranks
from tests.training.test_expert_layouts import BLOCKS, EXPERTS, SAMPLING
from tests.training.tiny import open_session

ONE_STEP = ["sft.iterations=1", "sft.batch_size=4", "train.token_budget=4096"]


def _opened(*overrides):
    session, _ = open_session("model.num_layers=2", *ONE_STEP, *overrides)
    settings = with_balance(session.run.settings)
    engine = build_engine(settings, settings.sft.optimizer, iterations=1, ranks=session.run.ranks)
    initialise(engine.network, settings.model, 0)
    engine.optimizer.reload_model_params()
    return session, engine


def _last_router(overrides):
    """Return weight, inputs and gradient of the last router, in a step of one micro-batch."""
    session, engine = _opened(*EXPERTS, *overrides)
    router, caught = engine.network.chunks[0].routers[-1], {}
    router.register_forward_pre_hook(lambda _, given: caught.update(inputs=given[0].detach()))

    def step():
        caught["grad"] = router.weight.main_grad.clone()
        return True, 0.0, None

    engine.optimizer.step = step
    run_sft(session, engine, start=0, on_iteration_end=lambda _: None)
    return {**caught, "weight": router.weight.detach().clone()}


def test_the_loss_is_that_of_the_switch_transformer_once_for_each_row():
    """Its gradient in the last router: experts x share of choices x mean probability, summed."""
    plain, balanced = (
        run_ranks(1, _last_router, overrides)[0] for overrides in ([], ["sft.balance_loss=0.3"])
    )
    assert torch.equal(plain["inputs"], balanced["inputs"])
    weight = plain["weight"].double().requires_grad_()
    probabilities = (plain["inputs"].flatten(0, 1).double() @ weight.t()).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0)
    loss = 4 * (chosen.mean(0) / 2 * probabilities.mean(0)).sum()
    (0.3 * loss).backward()
    added = balanced["grad"].double() - plain["grad"].double()
    assert weight.grad is not None and weight.grad.norm() > 1e-4
    assert float((added - weight.grad).norm() / weight.grad.norm()) < 1e-3


def _biases(overrides):
    """Return the biases of all layers before and after a supervised step, and after an update."""
    session, engine = _opened(*BLOCKS, *SAMPLING, *overrides)
    found = []

    def note():
        routers = engine.network.chunks[0].routers
        found.append(torch.stack([router.expert_bias.clone() for router in routers]))

    note()
    run_sft(session, engine, start=0, on_iteration_end=lambda _: None)
    note()
    session, engine = open_session("model.num_layers=2", *BLOCKS, *SAMPLING, *overrides)
    note()
    rollout, _ = collect_rollout(session, engine, 0)
    update_policy(session, engine, rollout, None)
    note()
    return found


def test_biases_move_in_the_supervised_phase_alone():
    [(before, after, start, end)] = run_ranks(1, _biases, ["sft.expert_bias_rate=0.01"])
    moved = after - before
    assert set(moved.abs().flatten().mul(1000).round().tolist()) <= {0.0, 10.0}
    assert (moved > 0).any() and (moved < 0).any()
    assert torch.equal(start, end)
    [(before, after, *_)] = run_ranks(1, _biases, [])
    assert torch.equal(before, after)
