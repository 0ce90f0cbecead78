"""Block models: rollouts and gradients equal a literal computation on whole rows."""

from dataclasses import replace

import pytest
import torch

from agrpo_megatron.diffusion.blocks import block_numbers
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import all_steps, at_level
from agrpo_megatron.training.rl import collect_rollout
from agrpo_megatron.training.update import prepare
from tests.megatron.literal import literal_logits
from tests.ranks import run_ranks
from tests.training.tiny import gradient, leaves, open_session, relative_error

BLOCKS = ["model.block_length=4", "algorithm.name=full_trajectory", "algorithm.mc_samples=null"]
KINDS = {
    "blocks of the row": ["model.attention=block_causal", "sampling.block_origin=row"],
    "blocks of the completion": ["model.attention=block_causal"],
    "causal context": ["model.attention=causal_context", "sampling.block_origin=row"],
}


def _blocks(positions, prompt, sampling):
    """Return the block of each position; a completion's own blocks precede its start, too."""
    origin = 0 if sampling.block_origin == "row" else prompt
    return (positions - origin).div(sampling.block_length, rounding_mode="floor")


def _mask(length, opened, prompt, settings):
    """Return who sees whom in a whole row whose block `opened` is open, by the definition."""
    positions = torch.arange(length)
    blocks = _blocks(positions, prompt, settings.sampling)
    if settings.model.attention == "block_causal":
        return blocks[None] <= blocks[:, None]
    causal, is_open = positions[None] <= positions[:, None], blocks == opened
    return causal | (is_open[None] & is_open[:, None])


def _logprobs(session, tensors, trajectory, number, step):
    """Return the log-probs of the tokens that a step fixed, from the whole row."""
    settings, prompt = session.run.settings, trajectory.prompts[number]
    when = trajectory.unmask_step[number]
    state = trajectory.tokens[number].masked_fill(when >= step, session.run.mask_id)
    row = torch.cat([prompt, state])
    places = len(prompt) + (when == step).nonzero()[:, 0]
    opened = _blocks(places[0], len(prompt), settings.sampling)
    mask = _mask(len(row), opened, len(prompt), settings)
    logits = literal_logits(tensors, settings.model, row, mask=mask)[places]
    logits[:, session.run.mask_id] = float("-inf")
    logits = logits[:, : settings.model.vocab_size]
    tokens = trajectory.tokens[number, when == step]
    return logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def _compare(overrides):
    session, engine = open_session(*BLOCKS, *overrides)
    settings = session.run.settings
    rollout, _ = collect_rollout(session, engine, 0)
    trajectory = rollout.trajectory
    tensors = leaves(session, engine, dtype=torch.float64)
    context = DrawContext(settings.algorithm, eos_id=session.run.eos_id, seed=0)
    draws = all_steps(trajectory, context)
    weights = at_level(draws, rollout, context).weight.amax(1)
    loss, errors = torch.zeros((), dtype=torch.float64), []
    for number, step, weight in zip(draws.rollout, draws.step, weights, strict=True):
        logprobs = _logprobs(session, tensors, trajectory, number, step)
        old = trajectory.logprobs[number, trajectory.unmask_step[number] == step]
        errors.append(float((logprobs.detach() - old).abs().max()))
        loss = loss - float(weight * rollout.advantages[number]) * logprobs.sum()
    (loss / len(rollout.rewards)).backward()
    metrics, grads = gradient(session, engine, rollout)
    literal = {name: tensor.grad for name, tensor in tensors.items()}
    prompts = {len(prompt) % 4 for prompt in trajectory.prompts}
    return max(errors), relative_error(grads, literal), metrics, prompts


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_equal_those_of_whole_rows(kind):
    """Rows end after the open block, and the context of a causal model is another span."""
    error, grads, metrics, prompts = run_ranks(1, _compare, KINDS[kind])[0]
    assert error < 2e-5 and grads < 1e-4
    assert metrics["ratio/max_error"] < 1e-5
    assert len(prompts) > 1, "prompts end at several places of a block"


ESTIMATORS = {
    "agrpo": ["algorithm.mc_samples=3"],
    "full_trajectory": [],
    "cj_grpo": [],
    "egspo": ["algorithm.mc_samples=2"],
    "just_grpo": [
        "sampling.unmasking=leftmost",
        "sampling.denoising_steps=8",
        "algorithm.mc_samples=null",
    ],
    "block_just_grpo": ["algorithm.mc_samples=null", "algorithm.merge_steps=2"],
    "diffu_grpo": [],  # hides a part of the prompt
    "coupled_grpo": [],
    "spg": [],
    "espo": [],
    "bgpo": [],
}


def _two_budgets(name, overrides):
    """Return a gradient with one state a row, and with all in one row; rows and states."""
    session, engine = open_session(
        *KINDS["blocks of the row"], "model.block_length=4", f"algorithm.name={name}", *overrides
    )
    rollout, _ = collect_rollout(session, engine, 0)
    found = []
    for budget in (1, 4000):
        settings = session.run.settings
        train = replace(settings.train, token_budget=budget)
        run = replace(session.run, settings=replace(settings, train=train))
        part = prepare(run.settings, engine.ranks, rollout, seed=settings.run.seed)
        _, grads = gradient(replace(session, run=run), engine, rollout)
        found.append((grads, len(part.lengths), len(part.scored.rollout), part.flops))
    return found


@pytest.mark.parametrize("name", ESTIMATORS)
def test_states_in_one_row_give_the_gradient_of_rows_of_their_own(name):
    alone, together = run_ranks(
        1, _two_budgets, name, ESTIMATORS[name] or ["algorithm.mc_samples=null"]
    )[0]
    grads, rows, states, flops = alone
    assert relative_error(together[0], grads) < 1e-5
    assert rows == states == together[2] >= together[1]
    assert together[3] <= flops
    assert together[1] <= 12 or name in ("diffu_grpo", "spg"), "a row for each rollout"


def _draws_of_blocks():
    """Return, for each rollout, the blocks of as many uniform draws as there are blocks."""
    session, engine = open_session(
        *KINDS["blocks of the completion"],
        "model.block_length=4",
        "sampling.completion_length=16",
        "sampling.denoising_steps=16",
        "sampling.early_end=false",
        "algorithm.mc_samples=4",
        "algorithm.allocation=equal",
        "algorithm.proposal=uniform",
    )
    rollout, _ = collect_rollout(session, engine, 0)
    part = prepare(session.run.settings, engine.ranks, rollout, seed=0)
    numbers = block_numbers(rollout.trajectory)[0][part.scored.rollout]
    blocks = [
        row[scored].unique().tolist()
        for row, scored in zip(numbers, part.scored.scored, strict=True)
    ]
    owners = part.scored.rollout.tolist()
    found = {owner: [] for owner in owners}
    for owner, (block,) in zip(owners, blocks, strict=True):
        found[owner].append(block)
    return found, len(part.lengths)


def test_as_many_draws_as_blocks_take_one_step_of_each():
    """Distinct draws follow the order of the steps, and so of the blocks."""
    found, rows = run_ranks(1, _draws_of_blocks)[0]
    assert rows == len(found) > 3
    assert all(sorted(blocks) == [0, 1, 2, 3] for blocks in found.values())


def _leftmost():
    """Return both gradients on left-to-right completions, and the states that each scores."""
    session, engine = open_session(
        *KINDS["blocks of the row"],
        "model.block_length=4",
        "sampling.unmasking=leftmost",
        "sampling.denoising_steps=8",
        "algorithm.name=just_grpo",
        "algorithm.mc_samples=null",
    )
    rollout, _ = collect_rollout(session, engine, 0)
    found = []
    for name in ("just_grpo", "block_just_grpo"):
        algorithm = replace(session.run.settings.algorithm, name=name)
        run = replace(session.run, settings=replace(session.run.settings, algorithm=algorithm))
        states = len(prepare(run.settings, engine.ranks, rollout, seed=0).scored.rollout)
        found.append((gradient(replace(session, run=run), engine, rollout)[1], states))
    return found, len({int(r) for r in rollout.advantages.nonzero()})


def test_all_blocks_from_one_row_give_the_gradient_of_left_to_right_decoding():
    """One token a step: four states of a completion, one for each place in a block."""
    ((exact, steps), (ours, states)), rollouts = run_ranks(1, _leftmost)[0]
    assert relative_error(ours, exact) < 1e-5
    assert states == 4 * rollouts < steps
