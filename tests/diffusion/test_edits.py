"""Edits: the sampler is LLaDA2.1's decoding, and its record rebuilds every state that it saw."""

import functools
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.config.settings import AlgorithmSettings, ModelSettings, SamplingSettings
from agrpo_megatron.diffusion.blocks import open_block
from agrpo_megatron.diffusion.packing import pack
from agrpo_megatron.diffusion.sampler import sample
from agrpo_megatron.estimators import timesteps
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import all_steps, draws_at, live_of, proposal_of, rows_at
from agrpo_megatron.scaling.flops import scored_positions
from agrpo_megatron.trajectories import join, select, tensors
from tests.diffusion.batching import rebuild_state
from tests.diffusion.hashed import (
    EOS,
    MASK,
    PADDED,
    SIZE,
    HashedModel,
    prompts_of,
    states_by_rollout,
)

torch.set_num_threads(1)
ROWS, WIDTH, BLOCK = 12, 12, 4
MODEL = ModelSettings(attention="block_causal", block_length=BLOCK)
BASE = SamplingSettings(
    completion_length=WIDTH,
    block_length=BLOCK,
    block_origin="row",
    denoising_steps=WIDTH,
    unmasking="low_confidence",
    temperature=0.0,
    threshold=0.5,
    edit_threshold=0.3,
    edit_steps=16,
    early_end=False,
)
SAMPLINGS = {
    "LLaDA2.1": BASE,
    "two at once": replace(BASE, denoising_steps=WIDTH // 2),
    "no extra steps": replace(BASE, edit_steps=0),
    "one extra step": replace(BASE, edit_steps=1, edit_threshold=0.1),
    "drawn": replace(BASE, temperature=1.0, edit_threshold=0.1, edit_steps=3),
    "drawn, ends": replace(BASE, temperature=1.0, end_at_stop=True, edit_steps=3),
    "blocks of the completion": replace(BASE, block_origin="completion"),
    "leftmost": replace(BASE, unmasking="leftmost", temperature=1.0, threshold=None, edit_steps=2),
    "top-k": replace(BASE, temperature=1.0, top_k=4, edit_steps=2),
}


def _gumbels(sampling):
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(sampling.most_steps, ROWS, WIDTH, PADDED, generator=generator)
    return -(-uniform.clamp(1e-9, 1 - 1e-7).double().log()).log()


def _model():
    return HashedModel(scale=9.0, eos_bonus=2.0)


@functools.cache
def _run(name):
    """Return (model with its calls recorded, prompts, trajectory); treat them as read-only."""
    sampling, model, prompts = SAMPLINGS[name], _model(), prompts_of(ROWS)
    context = replace(
        model.context(token_budget=60), model=MODEL, stop_ids=(EOS,), gumbels=_gumbels(sampling)
    )
    trajectory = sample(prompts, torch.arange(ROWS) + 500, context=context, sampling=sampling)
    return model, prompts, trajectory


def _decoded(prompt, number, sampling, gumbels):
    """Decode a completion as the public code of LLaDA2.1 does; return it and each forward's input.

    Only the number of tokens a step, the order and the noise are this project's.
    """
    model, seen, size = _model(), [], len(prompt)
    row = prompt.tolist() + [MASK] * WIDTH
    each = sampling.denoising_steps // (WIDTH // BLOCK)
    schedule = [BLOCK // each + (step < BLOCK % each) for step in range(each)]
    for block in range(sampling.most_blocks):
        start, end = open_block(size, block, sampling)
        step = extra = 0
        while start < end:
            old, masked = row[:end], [j for j in range(start, end) if row[j] == MASK]
            extra += not masked
            if extra > sampling.edit_steps:
                break
            seen.append(tuple(old[size:]))
            drawn, chance = _draw(model, old, start, sampling, gumbels[len(seen) - 1, number], size)
            wanted = min(schedule[min(step, each - 1)], len(masked))
            ranked = masked
            if sampling.unmasking == "low_confidence":
                ranked = sorted(masked, key=lambda j: -chance[j])
            sure = [j for j in masked if sampling.threshold and chance[j] > sampling.threshold]
            fixed = set(ranked[:wanted]) | set(sure)
            edited = {
                j
                for j in range(max(start, size), end)
                if j not in masked and drawn[j] != old[j] and chance[j] > sampling.edit_threshold
            }
            for j in fixed | edited:
                row[j] = drawn[j]
            step += 1
            if not masked and not edited:
                break
        if sampling.end_at_stop and EOS in row[size:end]:
            row[end:] = [EOS] * len(row[end:])
            break
    return row[size:], seen


def _draw(model, old, start, sampling, noise, size):
    """Return the drawn token and its probability at each position of the open block."""
    places = list(range(start, len(old)))
    scored = torch.zeros(1, len(old), dtype=torch.bool)
    scored[0, places] = True
    logits = model.logits(pack(torch.tensor([old]), torch.tensor([len(old)]), scored))
    logits = logits.double()[:, :SIZE]
    logits[:, MASK] = float("-inf")
    if sampling.temperature and sampling.top_k:
        kept = logits.topk(sampling.top_k).indices
        logits = torch.full_like(logits, float("-inf")).scatter(1, kept, logits.gather(1, kept))
    noisy = logits.clone()
    if sampling.temperature:
        noisy += noise[[max(j - size, 0) for j in places]][:, :SIZE]
    tokens = noisy.argmax(1)
    chances = logits.softmax(1).gather(1, tokens[:, None])[:, 0]
    pairs = zip(places, tokens.tolist(), chances.tolist(), strict=True)
    found = {place: (token, chance) for place, token, chance in pairs}
    return {j: t for j, (t, _) in found.items()}, {j: c for j, (_, c) in found.items()}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_sampler_and_its_record_are_the_plain_decoding(name):
    """Tokens and the input of every forward pass agree; the estimators see the same states."""
    model, prompts, trajectory = _run(name)
    sampling = SAMPLINGS[name]
    seen, gumbels = states_by_rollout(model, prompts), _gumbels(sampling)
    for number, prompt in enumerate(prompts):
        tokens, states = _decoded(prompt, number, sampling, gumbels)
        assert trajectory.tokens[number].tolist() == tokens
        assert [state for state, _ in seen[number]] == states
        assert int(trajectory.num_steps[number]) == len(states)
        steps = torch.arange(len(states))
        rebuilt = rebuild_state(trajectory, torch.full_like(steps, number), steps, MASK)
        for state, ours in zip(states, rebuilt.tolist(), strict=True):
            assert tuple(ours[: len(state)]) == state
    assert int(trajectory.num_steps.max()) <= sampling.most_steps
    assert int((trajectory.edit_step >= 0).sum()) > 5
    assert scored_positions(trajectory).tolist() == [
        sum(len(scored) for _, scored in states) for states in seen
    ]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_each_edit_overwrites_what_its_state_shows(name):
    _, _, trajectory = _run(name)
    rows, numbers = (trajectory.edit_step >= 0).nonzero(as_tuple=True)
    step, place = trajectory.edit_step[rows, numbers], trajectory.edit_position[rows, numbers]
    old, new = trajectory.edit_old[rows, numbers], trajectory.edit_new[rows, numbers]
    before, after = (rebuild_state(trajectory, rows, at, MASK) for at in (step, step + 1))
    assert torch.equal(before.gather(1, place[:, None])[:, 0], old)
    assert torch.equal(after.gather(1, place[:, None])[:, 0], new)
    assert (old != new).all() and (old != MASK).all()
    assert (trajectory.unmask_step[rows, place] < step).all()
    chance = trajectory.edit_logprob[rows, numbers].exp()
    assert float(chance.min()) >= SAMPLINGS[name].edit_threshold
    if SAMPLINGS[name].top_k:
        kept = trajectory.edit_support_ids[rows, numbers]
        assert (kept == new[:, None]).any(1).all() and kept.shape[1] == SAMPLINGS[name].top_k


def test_a_step_scores_the_tokens_that_it_put():
    """Targets are first tokens and new tokens; their log-probs are those of their draws."""
    _, _, trajectory = _run("drawn")
    draws = all_steps(trajectory, DrawContext(AlgorithmSettings(), None, 0))
    rows = rows_at(trajectory, draws)
    assert rows.scored.any(1).all()
    first = rebuild_state(trajectory, draws.rollout, draws.step, MASK)
    found = []
    for number, (owner, step) in enumerate(zip(draws.rollout, draws.step, strict=True)):
        after = first[number].clone()
        after[rows.scored[number]] = rows.targets[number][rows.scored[number]]
        following = rebuild_state(trajectory, owner[None], step[None] + 1, MASK)[0]
        assert torch.equal(after, following), "what is scored is what the step changed"
        assert (first[number] != following)[rows.scored[number]].all()
        found += rows.target_logprobs[number][rows.scored[number]].tolist()
    fixed = trajectory.logprobs.flatten().tolist()
    edits = trajectory.edit_logprob[trajectory.edit_step >= 0].tolist()
    assert sorted(found) == sorted(fixed + edits)


@pytest.mark.parametrize("proposal", ["uniform", "entropy", "gradient"])
def test_steps_that_changed_nothing_are_never_drawn_and_the_others_are_unbiased(proposal):
    _, _, trajectory = _run("drawn")
    algorithm = AlgorithmSettings(proposal=proposal, mc_samples=4, step_sampler="systematic")
    context = DrawContext(algorithm, None, 0)
    live, most = live_of(trajectory, context)
    acts = timesteps.step_actions(trajectory, most) > 0
    is_live = torch.arange(most) < live[:, None]
    assert (acts <= is_live).all() and (is_live & ~acts).any()
    chances = proposal_of(trajectory, context)
    assert ((chances > 0) == acts).all()
    points = (torch.arange(4000) + 0.5) / 4000  # draws at every point of a fine grid
    few = replace(context, algorithm=replace(algorithm, enumerate_short=False))
    draws = draws_at(trajectory, points.double().expand(ROWS, -1), few)
    table = torch.zeros(ROWS, most, dtype=torch.float64)
    table[draws.rollout, draws.step] = draws.weight
    assert float((table * live[:, None] - acts.double()).abs().max()) < 0.1
    assert (rows_at(trajectory, draws).scored.any(1)).all()


def test_live_steps_of_the_text_end_with_its_last_edit():
    _, _, trajectory = _run("drawn")
    live = timesteps.live_steps(trajectory, eos_id=EOS, rule="text")
    for number in range(ROWS):
        last = trajectory.unmask_step[number].tolist()
        for step, place in zip(
            trajectory.edit_step[number].tolist(),
            trajectory.edit_position[number].tolist(),
            strict=True,
        ):
            last[place] = max(last[place], step)
        text = (trajectory.tokens[number] != EOS).tolist()
        expected = max((s + 1 for s, is_text in zip(last, text, strict=True) if is_text), default=0)
        assert int(live[number]) == expected
    assert (live < trajectory.num_steps).any()


def test_parts_with_different_numbers_of_edits_are_joined():
    _, _, trajectory = _run("top-k")
    counts = (trajectory.edit_step >= 0).sum(1)
    order = counts.argsort()
    parts = [select(trajectory, order[:3]), select(trajectory, order[3:])]
    most = int(counts[order[:3]].max())
    cut = {n: t[:, :most] for n, t in tensors(parts[0]).items() if n.startswith("edit_")}
    joined = select(join([replace(parts[0], **cut), parts[1]]), order.argsort())
    assert most < int(counts.max())
    for name, tensor in tensors(trajectory).items():
        there = trajectory.edit_step >= 0 if name.startswith("edit_") else ...
        assert torch.equal(getattr(joined, name)[there], tensor[there]), name


def test_a_threshold_that_no_token_reaches_changes_no_token():
    """Greedy: the same completions, with one more step of each block, which finds no edit."""
    plain, never = replace(BASE, edit_threshold=None), replace(BASE, edit_threshold=1.0)
    found = [
        sample(
            prompts_of(ROWS),
            torch.arange(ROWS),
            context=replace(_model().context(), model=MODEL),
            sampling=sampling,
        )
        for sampling in (plain, never)
    ]
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert found[0].edit_step is None and found[1].edit_step.shape == (ROWS, 0)
    more = (found[1].num_steps - found[0].num_steps).tolist()
    sizes = [len(prompt) % BLOCK for prompt in prompts_of(ROWS)]
    assert more == [WIDTH // BLOCK + (size > 0) for size in sizes]
