"""The cached policy: keys and values of a block's first step, in rollouts and in updates."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from agrpo_megatron.benchmark.reference import model as plain
from agrpo_megatron.diffusion.blocks import open_part
from agrpo_megatron.diffusion.logprobs import policy_logits, token_logprobs
from agrpo_megatron.megatron.forward import RolloutForward
from agrpo_megatron.rollout.generate import sample_prompts
from agrpo_megatron.rollout.requests import encode_prompts
from agrpo_megatron.tasks.base import task_prompts
from agrpo_megatron.training.rl import collect_rollout
from tests.ranks import run_ranks
from tests.training.tiny import gradient, leaves, open_session, relative_error

CACHED = [
    "sampling.policy=cached",
    "sampling.completion_length=12",
    "sampling.denoising_steps=9",
    "model.num_layers=3",
    "algorithm.mc_samples=null",
    "algorithm.name=full_trajectory",
    "train.token_budget=300",
]
KINDS = {
    "random": [],
    "low confidence": ["sampling.unmasking=low_confidence", "sampling.threshold=0.5"],
    "ends": [
        "sampling.end_at_stop=true",
        "sampling.completion_length=32",
        "sampling.denoising_steps=16",
    ],
    "one block": ["sampling.block_length=12"],
    "candidates": ["sampling.top_k=7", "sampling.top_p=0.9", "sampling.temperature=0.8"],
    "shifted": ["model.shift=true"],
    "blocks of the row": ["sampling.block_origin=row"],
}


def _trajectory(overrides):
    """Return the trajectory of fifteen rows of five prompts, and the tokens of each pass."""
    session, engine = open_session(*CACHED, *overrides, world_size=dist.get_world_size())
    run, passes, start = session.run, [], RolloutForward.__call__
    texts = task_prompts(run.task, run.task.problems("train")[:5], split="train")
    encoded = encode_prompts(run, texts)
    prompts = [prompt[number % 3 :] for number, prompt in enumerate(encoded) for _ in range(3)]

    def counted(self, rows, draw_at):
        passes.append(len(rows.tokens))
        return start(self, rows, draw_at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutForward, "__call__", counted)
        trajectory, _ = sample_prompts(
            run,
            engine.rollout_network(),
            prompts,
            torch.arange(15),
            sampling=run.settings.sampling,
        )
    return trajectory, passes


def _keys_of(reference, ids):
    """Return the keys and values of every layer, where all tokens see each other."""
    return _run(reference, ids, range(len(ids)), None)[1]


def _run(reference, ids, part, known):
    """Run some tokens of a row; they see keys and values that are known at all others.

    Returns their logits, and the keys and values of every layer.
    """
    part = torch.tensor(list(part))
    others = torch.tensor(sorted(set(range(len(ids))) - set(part.tolist())), dtype=torch.int64)
    hidden = F.embedding(ids[part], reference.of("wte"))
    turns = plain._rotations(reference.model, len(ids), ids.device)
    turns, found = tuple(turn[part] for turn in turns), []
    for number in range(reference.model.num_layers):
        block = f"blocks.{number}"
        normed = plain._norm(reference, f"{block}.attn_norm", hidden)
        query, key, value = (
            F.linear(normed, reference.of(f"{block}.{name}_proj"))
            .unflatten(-1, (-1, reference.model.head_width))
            .transpose(0, 1)
            for name in "qkv"
        )
        query, key = plain._rotate(query, turns), plain._rotate(key, turns)
        found.append((key, value))
        if known is not None:
            key = torch.cat([known[number][0][:, others], key], 1)
            value = torch.cat([known[number][1][:, others], value], 1)
        repeat = len(query) // len(key)
        key, value = (x.repeat_interleave(repeat, 0) for x in (key, value))
        scores = query @ key.transpose(1, 2) / reference.model.head_width**0.5
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        hidden = hidden + F.linear(mixed, reference.of(f"{block}.attn_out"))
        hidden = hidden + plain._feed_forward(reference, number, hidden)
    logits = F.linear(plain._norm(reference, "ln_f", hidden), reference.of("ff_out"))
    return logits, found


def _expected(reference, rollout, mask_id, vocab):
    """Return the log-probs [R, C] of all sampled tokens, step by step, with gradient."""
    trajectory, shift = rollout.trajectory, int(reference.model.shift)
    sampling, result = trajectory.sampling, torch.zeros_like(trajectory.logprobs)
    for row, prompt in enumerate(trajectory.prompts):
        when = trajectory.unmask_step[row]
        for step in range(int(trajectory.num_steps[row])):
            fixed = (when == step).nonzero()[:, 0]
            state = torch.cat([prompt, trajectory.tokens[row].masked_fill(when >= step, mask_id)])
            column = len(prompt) + fixed
            number = next(
                n
                for n in range(sampling.most_blocks)
                if int(column[0]) < open_part(len(prompt), n, sampling, shift=False)[1]
            )
            start, end = open_part(len(prompt), number, sampling, shift=shift)
            begins = int(when[max(0, start + shift - len(prompt)) : end - len(prompt)].min())
            first = trajectory.tokens[row].masked_fill(when >= begins, mask_id)
            known = _keys_of(reference, torch.cat([prompt, first]))
            logits, _ = _run(reference, state, range(start, end), known)
            support = trajectory.support_ids
            logits = logits[column - shift - start]
            logprobs, _ = token_logprobs(
                policy_logits(logits, vocab, temperature=sampling.temperature),
                trajectory.tokens[row, fixed],
                vocab=vocab,
                support_ids=None if support is None else support[row, fixed],
            )
            result = result.index_put((torch.tensor(row), fixed), logprobs)
    return result


def _compare(overrides):
    """Return the sampler's log-probs and ours of the definition, and the two gradients."""
    session, engine = open_session(*CACHED, *overrides)
    settings, network = session.run.settings, engine.network
    rollout, _ = collect_rollout(session, engine, 0)
    tables = leaves(session, engine)
    reference = plain.Reference(settings.model, tables)
    expected = _expected(reference, rollout, settings.model.mask_token_id, network.vocab)
    metrics, ours = gradient(session, engine, rollout)
    live = rollout.trajectory.num_steps[:, None]
    loss = -(expected * rollout.advantages[:, None] / live).sum() / len(live)
    loss.backward()
    theirs = {name: table.grad for name, table in tables.items()}
    return rollout.trajectory, expected.detach(), metrics, ours, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_and_gradients_are_those_of_the_definition(kind):
    """Plain torch code runs each step's block alone, with the first step's keys elsewhere."""
    trajectory, expected, metrics, ours, theirs = run_ranks(1, _compare, KINDS[kind])[0]
    drawn = trajectory.is_sampled
    assert float((trajectory.logprobs - expected)[drawn].abs().max()) < 2e-5
    # The same kernels add the same numbers in the same order; candidates are normalised apart.
    assert metrics["ratio/max_error"] <= (1e-6 if kind == "candidates" else 0)
    assert relative_error(ours, theirs) < 1e-4
    if kind == "ends":
        assert len(set(trajectory.num_steps.tolist())) > 1


LAYOUTS = {
    "tp2": (2, []),
    "tp2-sp": (2, []),
    "pp2": (2, ["model.num_layers=4"]),
    "pp2 lockstep": (2, ["model.num_layers=4", "rollout.schedule=lockstep"]),
    "pp1": (1, ["rollout.cache_memory=2e-5"]),  # three slots for fifteen rows
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_and_the_batch_change_nothing(name):
    """Few rows in flight, in several groups: rows wait for slots, and for the budget."""
    size, own = LAYOUTS[name]
    expected, _ = run_ranks(1, _trajectory, [part for part in own if "layers" in part])[0]
    layout = f"parallel={name.partition(' ')[0]}"
    few = [layout, "rollout.groups=3", "train.token_budget=60", *own]
    for ours, _ in run_ranks(size, _trajectory, few):
        for field in ("tokens", "unmask_step", "num_steps"):
            assert torch.equal(getattr(ours, field), getattr(expected, field)), field
        assert float((ours.logprobs - expected.logprobs).abs().max()) < 1e-5


def test_first_steps_run_whole_rows_and_others_blocks_within_the_budget():
    """Three blocks of four tokens and of three steps; rows of a first step wait for each other."""
    trajectory, passes = run_ranks(1, _trajectory, ["train.token_budget=90"])[0]
    lengths = [len(prompt) + 12 for prompt in trajectory.prompts]
    assert sum(passes) == sum(3 * (length + 2 * 4) for length in lengths)
    assert max(passes) <= 90
    exact, many = run_ranks(1, _trajectory, ["train.token_budget=90", "sampling.policy=exact"])[0]
    assert sum(many) == sum(9 * length for length in lengths)
    assert len(passes) < len(many), "as later steps are short, more rows share a pass"
    assert not torch.equal(trajectory.tokens, exact.tokens), "it is another policy"


def _gradient(overrides):
    session, engine = open_session(*CACHED, *overrides, world_size=dist.get_world_size())
    rollout, _ = collect_rollout(session, engine, 0)
    return gradient(session, engine, rollout)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_gradients_are_the_same_under_any_layout(layout):
    (_, expected), *_ = run_ranks(1, _gradient, ["model.num_layers=4"])
    for metrics, ours in run_ranks(2, _gradient, ["model.num_layers=4", f"parallel={layout}"]):
        assert relative_error(ours, expected) < 1e-4
        assert metrics["ratio/max_error"] < 1e-5


def _updated(overrides):
    session, engine = open_session(*CACHED, *overrides)
    rollout, _ = collect_rollout(session, engine, 0)
    return gradient(session, engine, rollout)[0]


def test_an_approximate_policy_weighs_what_its_sampler_drew():
    """The exact policy is scored: probabilities differ, and weights correct them up to a limit."""
    limit = "algorithm.rollout_correction=1.02"
    approximate = run_ranks(1, _updated, ["sampling.policy=approximate", limit])[0]
    assert approximate["ratio/max_error"] < 1e-5
    assert 1.001 < approximate["mismatch/mean"] < approximate["mismatch/p99"]
    assert approximate["mismatch/p99"] <= approximate["mismatch/max"]
    assert 0 < approximate["correction/truncated"] < 1
    cached = run_ranks(1, _updated, [limit])[0]
    assert cached["mismatch/max"] < 1 + 1e-5
    assert cached["correction/truncated"] == 0
