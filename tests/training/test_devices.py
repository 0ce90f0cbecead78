"""Nothing of an iteration mixes devices, shown without a GPU: see `tests.devices`."""

import json
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agrpo_megatron.estimators.timesteps import step_entropies
from agrpo_megatron.evaluation.evaluate import evaluate
from agrpo_megatron.runs.resolve import resolve
from agrpo_megatron.training.preferences import update as preferring
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.training.sft import run_sft
from agrpo_megatron.training.supervised import learning
from tests.devices import DEVICE, Elsewhere, OtherDevice, move
from tests.ranks import run_ranks
from tests.training.tiny import open_session

BLOCKS = ["model.block_length=4", "sampling.unmasking=low_confidence"]
CASES = {
    "random": [],
    "low confidence": ["sampling.unmasking=low_confidence"],
    "entropy": ["sampling.unmasking=entropy"],
    "margin": ["sampling.unmasking=margin"],
    "top-k and top-p": ["sampling.top_k=20", "sampling.top_p=0.9"],
    "threshold": ["sampling.unmasking=low_confidence", "sampling.threshold=0.12"],
    "early end": [
        "sampling.early_end=true",
        "model.eos_token_id=39",
        "sampling.block_length=1",
        "sampling.denoising_steps=8",
    ],
    "dream": [
        "sampling.schedule=dream",
        "sampling.block_length=8",
        "sampling.unmasking=bernoulli",
        "model.shift=true",
    ],
    "published": [
        "algorithm.step_sampler=batch",
        "algorithm.proposal=entropy",
        "algorithm.uniform_mix=0",
        "algorithm.enumerate_short=false",
        "algorithm.live_steps=text",
    ],
    "stratified": ["algorithm.step_sampler=stratified", "algorithm.proposal=entropy"],
    "independent": ["algorithm.step_sampler=independent"],
    "by advantage": ["algorithm.allocation=advantage", "sampling.top_k=3"],
    "all steps": ["algorithm.name=full_trajectory", "algorithm.mc_samples=null"],
    "reference": ["algorithm.kl_coefficient=0.1"],
    "adapters": ["lora.rank=3", "algorithm.kl_coefficient=0.1", "lora.dropout=0.1"],
    "merged adapters": ["lora.rank=3", "lora.merge_rollouts=true", "lora.modules=[ff_out,q_proj]"],
    "blocks": [*BLOCKS, "model.attention=block_causal", "sampling.block_origin=row"],
    "blocks without a cache": [*BLOCKS, "model.attention=causal_context", "rollout.cached=false"],
}
SUPERVISED = {
    "solutions": [],
    "rows": ["sft.padding=completion"],
    "pairs": ["sft.loss=vrpo", "sft.preferences.masks=2"],
}
ROWS = {
    "rows": {"prompt": "1 2:", "response": "1+2"},
    "pairs": {"prompt": "1 2:", "chosen": "1+2", "rejected": "2+1"},
}


class BackwardAlone:
    """Stand in for the guarded optimizer step: Megatron's buffers take no stand-in tensors."""

    def __init__(self, *_args):
        pass

    def step(self, engine, batches, *, loss, examples, update):
        """Run forward and backward over the micro-batches."""
        engine.network.for_updates()
        chunk, collected = engine.network.chunks[0], []
        for batch in batches:
            total, metrics = loss(chunk(batch.rows), batch)
            total.backward()
            collected.append({**metrics, "loss": total.detach()})
        gradients = [p.grad for p in chunk.parameters() if p.requires_grad]
        assert all(isinstance(gradient, Elsewhere) for gradient in gradients)
        names = collected[0]
        sums = {name: sum(float(metrics[name].sum()) for metrics in collected) for name in names}
        return {**sums, "grad_norm": 0.0, "learning_rate": 0.0, "skipped_updates": 0}


def _elsewhere(*overrides):
    """Return a session and an engine whose weights are on the other device."""
    session, engine = open_session(*overrides)
    ranks = replace(session.run.ranks, device=DEVICE)
    for chunk in engine.network.chunks:
        move(chunk)
        chunk.ranks = ranks
    network = replace(engine.network, ranks=ranks)
    return replace(session, run=replace(session.run, ranks=ranks)), replace(engine, network=network)


def _iterate_all():
    """Return what came of each case: one process, as starting it takes longest."""
    return {name: _iterate(overrides) for name, overrides in CASES.items()}


@cache
def iterations():
    return run_ranks(1, _iterate_all)[0]


def _iterate(overrides):
    session, engine = _elsewhere(*overrides)
    reference = engine.network if session.run.settings.algorithm.kl_coefficient else None
    with OtherDevice():
        rollout, _ = collect_rollout(session, engine, 0)
        guard: Any = BackwardAlone()
        metrics, _ = update_policy(session, engine, rollout, reference, guard=guard)
        evaluate(session, engine.network, iteration=0, stage="before")
    tensors = (rollout.trajectory.tokens, rollout.trajectory.logprobs, rollout.rewards)
    return metrics["ratio/max_error"], all(isinstance(t, Elsewhere) for t in tensors)


def _supervise(kind, folder):
    """Return the iterations that were made, and the metrics of the last one."""
    overrides = list(SUPERVISED[kind])
    if kind != "solutions":
        file = folder / "data.jsonl"
        row = json.dumps(ROWS[kind])
        file.write_text("\n".join(row.replace("1", str(number)) for number in range(3, 9)))
        overrides += [f"sft.data={file}", "sft.eval_fraction=0.2"]
    session, engine = _elsewhere("sft.iterations=2", *overrides)
    resolved = resolve(session.run.settings, world_size=1, phases=("sft",))
    session = replace(session, run=replace(session.run, supervised=resolved.supervised))
    reference = engine.network if kind == "pairs" else None
    done = []
    learning.NanGuard = preferring.NanGuard = BackwardAlone
    with OtherDevice():
        run_sft(session, engine, reference, start=0, on_iteration_end=done.append)
    return done, session.output.log.last("sft")


def _mix(kind):
    with OtherDevice():
        there, here = torch.arange(3, device=DEVICE), torch.arange(3)
        sizes = torch.tensor([1.0, 1e8, -1e8], device=DEVICE)
        mixtures = {
            "sum": lambda: there + here,
            "scatter": lambda: there.scatter(0, here, 1),
            "index elsewhere": lambda: here[there],
            "values here": lambda: there.__setitem__(here, here),
            "any order": lambda: (there * 0.0).scatter_add_(0, there * 0, sizes),
            "allowed": lambda: there[here] + 1 + torch.tensor(2),
        }
        try:
            return isinstance(mixtures[kind](), Elsewhere)
        except RuntimeError as error:
            return str(error)


@pytest.mark.parametrize("name", CASES)
def test_an_iteration_stays_on_its_device(name):
    ratio_error, stayed = iterations()[name]
    assert stayed and ratio_error < 1e-5


@pytest.mark.parametrize("kind", SUPERVISED)
def test_supervision_stays_on_its_device(kind, tmp_path):
    """Updates, and the loss of held-out rows."""
    done, metrics = run_ranks(1, _supervise, kind, tmp_path)[0]
    assert done == [1, 2] and math.isfinite(metrics["loss"])
    assert ("held_out_loss" in metrics) == (kind != "solutions")


@pytest.mark.parametrize("kind", ["sum", "scatter", "index elsewhere", "values here", "allowed"])
def test_a_mixture_is_noticed(kind):
    found = _mix(kind)
    assert found is True if kind == "allowed" else "two devices" in found


def test_a_sum_in_any_order_is_noticed():
    assert "in any order" in str(_mix("any order"))


def test_the_entropy_of_a_step_does_not_depend_on_an_order():
    entropies = [[1.0, 5e-17, 5e-17, 5e-17], [0.5, 0.25, 0.0, 2.0]]
    with OtherDevice():
        trajectory: Any = SimpleNamespace(
            unmask_step=torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]], device=DEVICE),
            is_sampled=torch.ones(2, 4, dtype=torch.bool, device=DEVICE),
            entropies=torch.tensor(entropies, device=DEVICE),
            edit_step=None,
            edit_entropy=None,
        )
        sums = step_entropies(trajectory, 2)
    assert isinstance(sums, Elsewhere)
    assert sums.inner.tolist() == [[1.0, 0.0], [0.5, 2.25]]
