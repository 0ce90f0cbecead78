"""Cached rollouts of block models: the completions of uncached ones, with less work."""

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.diffusion.blocks import open_block
from agrpo_megatron.diffusion.sampler import SamplerHooks, SamplingStopped
from agrpo_megatron.megatron.pipeline import Direct
from agrpo_megatron.rollout.generate import sample_prompts
from agrpo_megatron.rollout.requests import encode_prompts
from agrpo_megatron.tasks.base import task_prompts
from tests.ranks import run_ranks
from tests.training.tiny import open_session

BLOCKS = [
    "model.attention=block_causal",
    "model.block_length=4",
    "model.num_layers=4",
    "sampling.completion_length=16",
    "sampling.denoising_steps=16",
]
FROM_ROW = "sampling.block_origin=row"
KINDS = {
    "blocks of the row": [FROM_ROW],
    "blocks of the completion": [],
    "causal context": ["model.attention=causal_context", FROM_ROW],
    "scaled positions": [
        "model.attention=causal_context",
        "model.rope_factor=4",
        "model.rope_original_length=8",
        "model.query_scale_beta=0.5",
    ],
    "confidence, two at once": [
        FROM_ROW,
        "sampling.unmasking=low_confidence",
        "sampling.denoising_steps=8",
        "sampling.threshold=0.6",
        "sampling.end_at_stop=true",
    ],
    "edits": [
        FROM_ROW,
        "sampling.unmasking=low_confidence",
        "sampling.edit_threshold=0.04",
        "sampling.edit_steps=2",
    ],
}
GROUP = 3


def _prompts(run, count=5):
    """Return prompts of several lengths, each for a group of rows."""
    texts = task_prompts(run.task, run.task.problems("train")[:count], split="train")
    encoded = encode_prompts(run, texts)
    return [prompt[number % 3 :] for number, prompt in enumerate(encoded) for _ in range(GROUP)]


def _sample(overrides, *, rows=None, hooks=None):
    """Return the trajectory of a rollout, and its packed tokens."""
    size = dist.get_world_size()
    session, engine = open_session(*BLOCKS, *overrides, world_size=size)
    run, prompts = session.run, _prompts(session.run)
    chosen = range(len(prompts)) if rows is None else rows
    sampled, forward = sample_prompts(
        run,
        engine.network,
        [prompts[row] for row in chosen],
        torch.tensor(list(chosen), dtype=torch.int64),
        sampling=run.settings.sampling,
        hooks=hooks,
    )
    return sampled, forward.tokens


def _assert_same(ours, theirs):
    for name in ("tokens", "unmask_step", "num_steps"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert float((ours.logprobs - theirs.logprobs).abs().max()) < 1e-5
    if theirs.edit_step is not None:
        assert theirs.edit_step.numel()
        for name in ("step", "position", "old", "new"):
            assert torch.equal(getattr(ours, f"edit_{name}"), getattr(theirs, f"edit_{name}"))


@pytest.mark.parametrize("kind", KINDS)
def test_cached_rollouts_are_the_uncached_ones(kind):
    ours, few = run_ranks(1, _sample, KINDS[kind])[0]
    theirs, many = run_ranks(1, _sample, [*KINDS[kind], "rollout.cached=false"])[0]
    _assert_same(ours, theirs)
    assert 3 * few < many
    if "end_at_stop" in " ".join(KINDS[kind]):
        assert len(set(ours.num_steps.tolist())) > 1


LAYOUTS = {
    "tp2": (2, []),
    "tp2 edits": (2, KINDS["edits"]),
    "pp2": (2, []),
    "pp2 lockstep": (2, ["rollout.schedule=lockstep"]),
    "tp2-sp": (2, []),
    "pp1": (1, ["rollout.cache_memory=3e-5"]),  # four slots for fifteen rows
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_and_the_batch_change_nothing(name):
    """Few rows in flight, in several groups: rows wait for slots, and for their group's prompt."""
    size, own = LAYOUTS[name]
    expected, _ = run_ranks(1, _sample, [FROM_ROW, *own] if "edits" in name else [FROM_ROW])[0]
    few = [f"parallel={name.partition(' ')[0]}", "rollout.groups=3", "rollout.rows=2", *own]
    for ours, _ in run_ranks(size, _sample, [FROM_ROW, *few]):
        _assert_same(ours, expected)


def _count():
    """Return the packed tokens of a rollout with a slot for each row, and what they must be."""
    session, engine = open_session(*BLOCKS, FROM_ROW)
    run, prompts = session.run, _prompts(session.run)
    sampled, forward = sample_prompts(
        run,
        engine.network,
        prompts,
        torch.arange(len(prompts)),
        sampling=run.settings.sampling,
    )
    expected, known = 0, set()
    for prompt, steps in zip(prompts, sampled.num_steps.tolist(), strict=True):
        context, end = len(prompt) // 4 * 4, len(prompt) + 16
        starts = range(context, end, 4)
        sizes = [min(4, end - start) for start in starts]
        ran = [min(n, n + at - len(prompt)) for n, at in zip(sizes, starts, strict=True)]
        assert steps == sum(ran) == 16
        expected += sum(size * count for size, count in zip(sizes, ran, strict=True))
        expected += sum(sizes[:-1])  # each finished block once
        if bytes(prompt.numpy()) not in known:
            known.add(bytes(prompt.numpy()))
            expected += context
    return forward.tokens, expected


def test_a_step_runs_the_open_block_and_each_finished_block_runs_once():
    """One token a step; the prompt of a group is computed once."""
    tokens, expected = run_ranks(1, _count)[0]
    assert tokens == expected


def _stop_and_go():
    """Stop in the middle, and sample what was not complete."""
    done = []
    turns = iter(range(10**6))
    hooks = SamplerHooks(
        on_complete=lambda rows, part: done.extend(zip(rows, part.tokens, strict=True)),
        should_stop=lambda: next(turns) == 60,
    )
    few = [FROM_ROW, "rollout.rows=4"]
    with pytest.raises(SamplingStopped):
        _sample(few, hooks=hooks)
    whole, _ = _sample([FROM_ROW])
    rest = sorted(set(range(len(whole.tokens))) - {row for row, _ in done})
    later, _ = _sample(few, rows=rest)
    return done, rest, later, whole


def test_a_rollout_that_was_stopped_goes_on_with_the_same_completions():
    done, rest, later, whole = run_ranks(1, _stop_and_go)[0]
    assert done and rest
    for row, tokens in done:
        assert torch.equal(tokens, whole.tokens[row])
    assert torch.equal(later.tokens, whole.tokens[rest])


def _refused():
    with pytest.raises(ValueError, match="rollout.cache_memory") as error:
        _sample(["rollout.cache_memory=2e-6"])
    return str(error.value)


def test_a_cache_that_holds_no_row_is_refused():
    said = run_ranks(1, _refused)[0]
    assert said.startswith("rollout.cache_memory=2e-06 GiB holds no row: one of")
    assert "rollout.cached=false" in said


def _long(block):
    """Return the packed tokens of four completions of 256 tokens after one prompt of 256."""
    session, engine = open_session(
        "model.attention=block_causal",
        f"model.block_length={block}",
        f"sampling.block_length={block}",
        FROM_ROW,
        "model.num_layers=1",
        "model.max_sequence_length=512",
        "sampling.completion_length=256",
        "sampling.denoising_steps=256",
        "sampling.early_end=false",
        "train.token_budget=16384",
    )
    prompts = [torch.arange(256) % 70 + 3] * 4
    sampling = session.run.settings.sampling
    _, forward = sample_prompts(
        session.run, engine.network, prompts, torch.arange(4), sampling=sampling
    )
    ends = [open_block(256, number, sampling)[1] for number in range(256 // block)]
    return forward.tokens // 4, block * sum(ends)


@pytest.mark.parametrize(("block", "cached", "open_rows"), [(4, 1340, 98816), (32, 8480, 102400)])
def test_the_token_forwards_of_docs_blocks(block, cached, open_rows):
    """One token a step: counted with the cache, and rows up to the open block by arithmetic."""
    assert run_ranks(1, _long, block)[0] == (cached, open_rows)
    assert 8 * cached < open_rows


def _most_tokens(overrides):
    """Return the packed tokens of the largest forward pass."""
    session, engine = open_session(*BLOCKS, FROM_ROW, "train.token_budget=90", *overrides)
    found, start = [], Direct._start

    def recorded(self, item):
        found.append(len(item.rows.tokens))
        start(self, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Direct, "_start", recorded)
        prompts = _prompts(session.run)
        sampling = session.run.settings.sampling
        ids = torch.arange(len(prompts))
        sample_prompts(session.run, engine.network, prompts, ids, sampling=sampling)
    return max(found), len(found)


def test_forward_passes_stay_within_the_token_budget():
    """Also without a cache, where rows grow with every block."""
    uncached, many = run_ranks(1, _most_tokens, ["rollout.cached=false"])[0]
    cached, few = run_ranks(1, _most_tokens, [])[0]
    assert uncached <= 90 and cached <= 90
    assert few < many, "as cached rows are short, more of them share a pass"
