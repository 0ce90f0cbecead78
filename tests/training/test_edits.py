"""Edits in the policy gradient: actions with a ratio of their own, as a slow loop counts them."""

import pytest
import torch

from agrpo_megatron.training.rl import collect_rollout
from tests.megatron.literal import literal_logits
from tests.ranks import run_ranks
from tests.training.tiny import gradient, leaves, open_session, relative_error

EDITS = [
    "model.attention=block_causal",
    "model.block_length=4",
    "sampling.block_origin=row",
    "sampling.early_end=false",
    "sampling.unmasking=low_confidence",
    "sampling.edit_threshold=0.04",
    "sampling.edit_steps=3",
]
FULL = ["algorithm.name=full_trajectory", "algorithm.mc_samples=null"]


def _actions(trajectory, number):
    """Yield each step's state and its actions, {position: token}, from the events of a rollout."""
    final, when = trajectory.tokens[number].tolist(), trajectory.unmask_step[number].tolist()
    names = ("edit_step", "edit_position", "edit_old", "edit_new")
    events = list(zip(*(getattr(trajectory, name)[number].tolist() for name in names), strict=True))
    first = list(final)
    for step, place, old, _ in reversed(events):
        if step >= 0:
            first[place] = old
    state: list[int | None] = [None] * len(final)
    for step in range(int(trajectory.num_steps[number])):
        actions = {place: first[place] for place, at in enumerate(when) if at == step}
        for _, place, old, new in (event for event in events if event[0] == step):
            assert state[place] == old
            actions[place] = new
        yield list(state), actions
        for place, token in actions.items():
            state[place] = token
    assert state == final


def _logprobs(session, tensors, prompt, state, actions):
    """Return the log-probs of a step's actions, from the whole row under the definition."""
    settings, mask_id = session.run.settings, session.run.mask_id
    row = torch.cat([prompt, torch.tensor([mask_id if t is None else t for t in state])])
    blocks = torch.arange(len(row)) // settings.sampling.block_length
    visible = blocks[None] <= blocks[:, None]
    places = [len(prompt) + place for place in actions]
    logits = literal_logits(tensors, settings.model, row, mask=visible)[places]
    logits[:, mask_id] = float("-inf")
    logprobs = logits[:, : settings.model.vocab_size].log_softmax(-1)
    return logprobs[range(len(places)), list(actions.values())]


def _compare(overrides):
    session, engine = open_session(*EDITS, *FULL, *overrides)
    rollout, _ = collect_rollout(session, engine, 0)
    trajectory = rollout.trajectory
    tensors = leaves(session, engine, dtype=torch.float64)
    loss, edits, idle = torch.zeros((), dtype=torch.float64), 0, 0
    for number, prompt in enumerate(trajectory.prompts):
        steps = int(trajectory.num_steps[number])
        for state, actions in _actions(trajectory, number):
            edits += sum(state[place] is not None for place in actions)
            idle += not actions
            if actions:
                logprobs = _logprobs(session, tensors, prompt, state, actions)
                loss = loss - float(rollout.advantages[number]) / steps * logprobs.sum()
    (loss / len(rollout.rewards)).backward()
    metrics, grads = gradient(session, engine, rollout)
    literal = {name: tensor.grad for name, tensor in tensors.items()}
    return relative_error(grads, literal), metrics, edits, idle


def test_the_gradient_is_that_of_a_slow_loop_over_tokens_and_edits():
    """Steps that only edit count, with the ratio 1 before the first update; so do idle steps."""
    error, metrics, edits, idle = run_ranks(1, _compare, [])[0]

    assert edits > 10 and idle > 5
    assert error < 5e-6
    assert metrics["ratio/max_error"] < 1e-5


OTHERS = {
    "drawn steps": ["algorithm.mc_samples=3"],
    "top-k": [*FULL, "sampling.top_k=6"],
    "causal context": [*FULL, "model.attention=causal_context"],
    "cj_grpo": ["algorithm.name=cj_grpo", "algorithm.mc_samples=null"],
    "egspo": ["algorithm.name=egspo", "algorithm.mc_samples=20"],
    "sequences": [*FULL, "algorithm.level=sequence"],
    "all drawn tokens": [*FULL, "sampling.record_drawn=true", "algorithm.scoring=augmented"],
    "random": [*FULL, "sampling.unmasking=random"],
    "finished text": ["algorithm.name=espo", "algorithm.mc_samples=null"],
}


def _update(overrides):
    session, engine = open_session(*EDITS, *overrides)
    rollout, _ = collect_rollout(session, engine, 0)
    metrics, grads = gradient(session, engine, rollout)
    norm = sum(float(grad.double().square().sum()) for grad in grads.values()) ** 0.5
    return metrics, norm, int((rollout.trajectory.edit_step >= 0).sum())


@pytest.mark.parametrize("name", OTHERS)
def test_the_first_ratio_is_one_with_edits(name):
    """Candidates of top-k are those of the edit; other estimators take the same rows."""
    metrics, norm, edits = run_ranks(1, _update, OTHERS[name])[0]
    assert edits > 10 and norm > 0
    assert metrics["ratio/max_error"] < 1e-5
