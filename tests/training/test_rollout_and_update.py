"""Rollout and update score the same states with the same network: ratio 1, no row too many."""

from collections import Counter

import pytest
import torch

from agrpo_megatron.megatron.layers.scored import LEAST_ROWS
from agrpo_megatron.training.rl import collect_rollout, update_policy
from agrpo_megatron.training.sft import run_sft
from tests.diffusion.batching import rebuild_state
from tests.ranks import run_ranks
from tests.training.tiny import open_session

ALL_STATES = "algorithm={name: full_trajectory, mc_samples: null}"
CASES = {
    "random": [ALL_STATES],
    "random, several tokens a step": [ALL_STATES, "sampling.denoising_steps=2"],
    "low confidence": [ALL_STATES, "sampling.unmasking=low_confidence"],
    "entropy": [ALL_STATES, "sampling.unmasking=entropy"],
    "top-k, hot": [ALL_STATES, "sampling.top_k=5", "sampling.temperature=1.7"],
    "top-p, cold": [
        ALL_STATES,
        "sampling.top_p=0.7",
        "sampling.temperature=0.6",
        "sampling.unmasking=low_confidence",
    ],
    "top-k and top-p": [
        ALL_STATES,
        "sampling.top_k=20",
        "sampling.top_p=0.9",
        "sampling.unmasking=entropy",
        "sampling.confidence=untempered",
    ],
    "threshold": [
        ALL_STATES,
        "sampling.unmasking=low_confidence",
        "sampling.threshold=0.12",
        "sampling.block_length=8",
        "sampling.denoising_steps=8",
    ],
    "random with threshold": [ALL_STATES, "sampling.threshold=0.12"],
    "early end": [
        ALL_STATES,
        "sampling.block_length=1",
        "sampling.denoising_steps=8",
        "model.eos_token_id=39",
    ],
    "mask token allowed": [ALL_STATES, "sampling.forbid_mask_token=false"],
    "drawn steps": ["algorithm.mc_samples=1", "algorithm.proposal=entropy"],
    "drawn steps, published": [
        "algorithm.mc_samples=3",
        "algorithm.step_sampler=batch",
        "algorithm.uniform_mix=0",
        "algorithm.enumerate_short=false",
        "algorithm.live_steps=text",
    ],
}


def _watch(chunk, seen):
    """Note every row that goes in, with the places scored in it, and what the head is given."""

    def before(_module, args):
        rows = args[0]
        bounds = rows.cu_seqlens.tolist()
        scored = torch.zeros(len(rows.tokens), dtype=torch.bool)
        scored[rows.scored] = True
        for start, end in zip(bounds, bounds[1:], strict=False):
            tokens, marks = rows.tokens[start:end].tolist(), scored[start:end].tolist()
            seen["rows"].append((tuple(tokens), tuple(i for i, m in enumerate(marks) if m)))
        seen["scored"].append(len(rows.scored))
        seen["packed"].append(len(rows.tokens))

    def at_head(_module, args, output):
        assert args[0].shape[:-1] == output[0].shape[:-1]
        seen["head"].append(args[0].shape[:-1].numel())

    return [
        chunk.register_forward_pre_hook(before),
        chunk.output_layer.register_forward_hook(at_head),
    ]


def _fresh():
    return {"rows": [], "scored": [], "packed": [], "head": []}


def _rebuilt(session, rollout):
    """Return every (row, scored places) of every step that ran, by rollout."""
    trajectory, mask = rollout.trajectory, session.run.mask_id
    result = []
    for number, prompt in enumerate(trajectory.prompts):
        steps = torch.arange(int(trajectory.num_steps[number]))
        states = rebuild_state(trajectory, torch.full_like(steps, number), steps, mask)
        for step, state in zip(steps.tolist(), states, strict=True):
            places = (trajectory.unmask_step[number] == step).nonzero().squeeze(1) + len(prompt)
            row = (tuple(prompt.tolist() + state.tolist()), tuple(places.tolist()))
            result.append((number, row))
    return result


def _iterate(overrides):
    """Run one iteration and return what the network saw, and what the trajectory rebuilds."""
    session, engine = open_session(*overrides)
    rollout_seen, update_seen = _fresh(), _fresh()
    hooks = _watch(engine.network.chunks[0], rollout_seen)
    rollout, metrics = collect_rollout(session, engine, 0)
    for hook in hooks:
        hook.remove()
    rebuilt = _rebuilt(session, rollout)
    _watch(engine.network.chunks[0], update_seen)
    update, _ = update_policy(session, engine, rollout, None)
    trajectory = rollout.trajectory
    used = (rollout.advantages != 0).tolist()
    return {
        "rollout": rollout_seen,
        "update": update_seen,
        "rebuilt": [row for _, row in rebuilt],
        "rebuilt with advantage": [row for number, row in rebuilt if used[number]],
        "sampled": int((trajectory.unmask_step < trajectory.num_steps[:, None]).sum()),
        "num_steps": trajectory.num_steps.tolist(),
        "metrics": {**metrics, **update},
    }


def _iterate_all():
    return {name: _iterate(overrides) for name, overrides in CASES.items()}


@pytest.fixture(scope="module")
def results():
    return run_ranks(1, _iterate_all)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_first_updates_ratio_is_one(results, name):
    metrics = results[name]["metrics"]
    assert metrics["ratio/max_error"] < 1e-5
    assert metrics["clip_fraction"] == 0
    assert metrics["grad_norm"] > 1e-2, "the update is not empty"


@pytest.mark.parametrize("name", CASES)
def test_every_rebuilt_state_is_one_that_the_sampler_saw(results, name):
    result = results[name]
    saw = Counter(tokens for tokens, _ in result["rollout"]["rows"])
    assert saw == Counter(tokens for tokens, _ in result["rebuilt"])
    trained = Counter(result["update"]["rows"])
    expected = Counter(result["rebuilt with advantage"])
    assert trained == expected if ALL_STATES in CASES[name] else trained <= expected
    assert trained.total() == result["metrics"]["rows"] > 0


@pytest.mark.parametrize("name", CASES)
def test_the_head_sees_the_scored_tokens_and_no_other(results, name):
    """Full-vocabulary logits of unscored tokens are not formed, in rollout or in training.

    A forward with fewer scored tokens than `LEAST_ROWS` is filled up to that number.
    """
    result = results[name]
    rollout, update = result["rollout"], result["update"]
    for forwards in (rollout, update):
        filled = [max(count, LEAST_ROWS) for count in forwards["scored"]]
        assert forwards["head"] == filled
    assert sum(update["scored"]) == sum(len(places) for _, places in update["rows"])
    assert sum(update["head"]) < sum(update["packed"]) / 2
    if name.startswith("random") and "threshold" not in name:
        assert sum(rollout["scored"]) == result["sampled"], "each token is scored once"
    else:
        assert sum(rollout["head"]) <= 4 * sum(rollout["packed"]) / 8


@pytest.mark.parametrize("name", CASES)
def test_tokens_unmasked_per_second_are_those_of_the_steps_that_ran(results, name):
    found = results[name]["metrics"]
    rate = results[name]["sampled"] / found["timing/rollout"]
    assert found["perf/unmasked_per_second"] == pytest.approx(rate)


def test_the_cases_are_what_they_say(results):
    early, sure = results["early end"]["num_steps"], results["threshold"]["num_steps"]
    assert min(early) < 8 and max(early) == 8
    assert len(set(sure)) > 1 and min(sure) < 8
    assert results["drawn steps"]["metrics"]["rows"] <= 12


def _supervised():
    session, engine = open_session("sft.iterations=1", phase="sft")
    seen = _fresh()
    _watch(engine.network.chunks[0], seen)
    run_sft(session, engine, start=0, on_iteration_end=lambda _: None)
    return seen, session.run.mask_id, session.output.log.records[0]["scored_tokens"]


def test_the_head_sees_the_masked_tokens_only_in_supervised_training():
    seen, mask, scored = run_ranks(1, _supervised)[0]
    masked = [tuple(i for i, t in enumerate(row) if t == mask) for row, _ in seen["rows"]]
    assert masked == [places for _, places in seen["rows"]]
    assert seen["head"] == seen["scored"] and sum(seen["head"]) == scored == sum(map(len, masked))
