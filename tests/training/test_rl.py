"""The update: equal to a literal computation, indifferent to what carries no gradient."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.checkpoint.start import load_start_weights
from agrpo_megatron.estimators import table
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import at_level, draw_counts, drawn_steps
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.training.rl import collect_rollout, update_policy
from tests.megatron.literal import literal_logits
from tests.ranks import run_ranks
from tests.training.tiny import gradient, open_session, relative_error

LITERAL = {
    "plain": [],
    "as many draws of each rollout": ["algorithm.allocation=equal"],
    "tempered, truncated, clipped, to a constant": [
        "sampling.temperature=0.8",
        "sampling.top_k=12",
        "sampling.top_p=0.9",
        "algorithm.clip_low=0.1",
        "algorithm.clip_high=0.3",
        "algorithm.normaliser=constant",
        "algorithm.normaliser_constant=7",
        "algorithm.scale_by_std=true",
    ],
    "shifted, Dream's time, Bernoulli": [
        "model.shift=true",
        "model.qkv_bias=true",
        "sampling.schedule=dream",
        "sampling.unmasking=bernoulli",
        "sampling.block_length=8",
        "sampling.denoising_steps=6",
    ],
    "with KL, entropy proposal": [
        "sampling.unmasking=low_confidence",
        "algorithm.kl_coefficient=0.5",
        "algorithm.proposal=entropy",
        "algorithm.mc_samples=1",
        "algorithm.baseline=leave_one_out",
    ],
}


def _perturb(network):
    """Move the policy away from the one that sampled, so that ratios are not 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in network.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _reference(session):
    reference = build_network(session.run.settings, session.run.ranks)
    load_start_weights(reference, session.run.settings)
    return reference


def _tensors(session, network, dtype=torch.float64):
    weights = {name: p.detach() for name, p in network.named_parameters()}
    exported = export_hf(weights, session.run.settings.model, session.run.ranks)
    return {name: tensor.to(dtype) for name, tensor in exported.items()}


def _literal_advantages(rewards, algorithm):
    """Return reward minus the group's mean, or the others' mean, or over the group's spread."""
    result = []
    for start in range(0, len(rewards), algorithm.group_size):
        group = rewards[start : start + algorithm.group_size]
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            base = others if algorithm.baseline == "leave_one_out" else group
            value = reward - sum(base) / len(base)
            if algorithm.scale_by_std:
                value /= float(torch.tensor(group).std()) + 1e-6
            result.append(value)
    return result


def _literal_logprobs(session, tensors, rollout, number, step):
    """Return the log-probs of the tokens fixed at a step, from one unpacked row."""
    trajectory, settings = rollout.trajectory, session.run.settings
    tokens, when = trajectory.tokens[number].tolist(), trajectory.unmask_step[number].tolist()
    state = [t if w < step else session.run.mask_id for t, w in zip(tokens, when, strict=True)]
    prompt = trajectory.prompts[number]
    row = torch.cat([prompt, torch.tensor(state)])
    first = len(prompt) - settings.model.shift  # the state that predicts the first token
    logits = literal_logits(tensors, settings.model, row)[first : first + len(tokens)]
    logits = logits / settings.sampling.temperature
    result = []
    for place in (place for place, w in enumerate(when) if w == step):
        allowed = [v for v in range(logits.shape[1]) if v != session.run.mask_id]
        if trajectory.support_ids is not None:
            allowed = [v for v in trajectory.support_ids[number, place].tolist() if v >= 0]
        result.append(logits[place, tokens[place]] - logits[place, allowed].logsumexp(0))
    return torch.stack(result)


def _literal_loss(session, tensors, start, rollout, draws):
    """Return the loss as its definition reads: row by row."""
    algorithm, trajectory = session.run.settings.algorithm, rollout.trajectory
    advantages = _literal_advantages(rollout.rewards.tolist(), algorithm)
    total = torch.zeros((), dtype=torch.float64)
    for number, step, weight in zip(draws.rollout, draws.step, draws.weight, strict=True):
        number, step = int(number), int(step)
        logprobs = _literal_logprobs(session, tensors, rollout, number, step)
        old = trajectory.logprobs[number, trajectory.unmask_step[number] == step]
        ratio = (logprobs - old).exp()
        bounded = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
        terms = -torch.minimum(ratio * advantages[number], bounded * advantages[number])
        if algorithm.kl_coefficient > 0:
            gap = _literal_logprobs(session, start, rollout, number, step) - logprobs
            terms = terms + algorithm.kl_coefficient * (gap.exp() - gap - 1) * ratio
        total = total + float(weight) * terms.sum()
    return total / len(rollout.rewards)


def _compare_with_literal(overrides):
    """Return loss errors, gradient error, and the update's metrics."""
    few = ["algorithm.prompts_per_iteration=2", "algorithm.group_size=3"]
    session, engine = open_session(*few, *overrides)
    rollout, _ = collect_rollout(session, engine, 0)
    reference = _reference(session)
    start = _tensors(session, reference)
    _perturb(engine.network)
    algorithm = session.run.settings.algorithm
    context = DrawContext(algorithm, eos_id=session.run.eos_id, seed=session.run.settings.run.seed)
    draws = drawn_steps(rollout.trajectory, context, draw_counts(rollout, context))
    weights = at_level(draws, rollout, context).weight.amax(1)  # with the normaliser
    draws = replace(draws, weight=weights)
    metrics, grads = gradient(
        session, engine, rollout, reference if algorithm.kl_coefficient > 0 else None
    )
    tensors = {n: t.requires_grad_() for n, t in _tensors(session, engine.network).items()}
    loss = _literal_loss(session, tensors, start, rollout, draws)
    loss.backward()
    literal = {name: tensor.grad for name, tensor in tensors.items()}
    return abs(float(loss) - metrics["loss"]), relative_error(grads, literal), metrics


@pytest.mark.parametrize("name", LITERAL)
def test_loss_and_gradient_equal_a_literal_computation(name):
    loss, grads, metrics = run_ranks(1, _compare_with_literal, LITERAL[name])[0]
    assert loss < 1e-5
    assert grads < 1e-4
    assert metrics["ratio/max_error"] > 0.1 and metrics["clip_fraction"] > 0
    assert 0.01 < metrics["ratio/p99_error"] <= metrics["ratio/max_error"]
    assert metrics["micro_batches"] > 1
    assert (metrics["kl"] > 1e-3) == ("KL" in name)


def _always_end_of_text(network, eos):
    """Make every position predict end-of-text, almost surely."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                parameter.zero_()
        (chunk,) = network.chunks
        chunk.embedding.word_embeddings.weight.fill_(1.0)
        chunk.output_layer.weight.mul_(0.1)
        chunk.output_layer.weight[eos] = 1.0


def _completion_tokens():
    """Return the tokens of a rollout, what ends a text, and the mean length that is logged."""
    session, engine = open_session()
    tokens = collect_rollout(session, engine, 0)[0].trajectory.tokens
    common = int(tokens[tokens != session.run.eos_id].mode().values)
    stops = frozenset({session.run.eos_id, common})
    tokenizer = replace(session.run.tokenizer, stop_ids=stops)
    session = replace(session, run=replace(session.run, tokenizer=tokenizer))
    rollout, metrics = collect_rollout(session, engine, 0)
    return rollout.trajectory.tokens.tolist(), stops, metrics["completions/mean_length"]


def test_a_completion_is_as_long_as_its_text():
    """Any of the tokenizer's stop tokens ends it, as in evaluations."""
    ((rows, stops, mean),) = run_ranks(1, _completion_tokens)
    lengths = [next((i for i, t in enumerate(row) if t in stops), len(row)) for row in rows]
    assert 0 < mean == sum(lengths) / len(rows) < len(rows[0])


def _train_on_empty_completions(rule):
    session, engine = open_session(
        f"algorithm.live_steps={rule}", "algorithm.baseline=none", "optimizer.weight_decay=0"
    )
    _always_end_of_text(engine.network, session.run.eos_id)
    engine.optimizer.reload_model_params()
    before = [p.detach().clone() for _, p in engine.network.named_parameters()]
    rollout, _ = collect_rollout(session, engine, 0)
    metrics, _ = update_policy(session, engine, rollout, None)
    after = [p for _, p in engine.network.named_parameters()]
    return {
        "tokens": set(rollout.trajectory.tokens.unique().tolist()) - {session.run.eos_id},
        "steps": set(rollout.trajectory.num_steps.tolist()),
        "finite": all(bool(p.isfinite().all()) for p in after),
        "moved": any(not torch.equal(p, q) for p, q in zip(after, before, strict=True)),
        "used": int((rollout.advantages != 0).sum()),
        "metrics": metrics,
    }


@pytest.mark.parametrize(("rule", "steps"), [("text", 0), ("sampled", 2)])
def test_completions_that_are_all_end_of_text_train_without_error(rule, steps):
    """Rows end after the first of two blocks, two steps in; `text` leaves none of them to score.

    By `sampled`, both steps of every rollout with an advantage are scored.
    """
    result = run_ranks(1, _train_on_empty_completions, rule)[0]
    assert result["tokens"] == set() and result["steps"] == {2}
    assert result["finite"]
    assert result["used"] > 0
    assert result["metrics"]["rows"] == steps * result["used"]
    assert result["moved"] == (steps > 0) == (result["metrics"]["grad_norm"] > 0)
    assert result["metrics"]["ratio/max_error"] < 1e-5
    assert result["metrics"]["ratio/mean"] == pytest.approx(1.0, abs=1e-5)


def _skip_or_not():
    """Return metrics and gradients of one rollout batch: rows skipped, and all rows kept."""
    session, engine = open_session("algorithm.allocation=equal")
    rollout, _ = collect_rollout(session, engine, 0)
    flat = rollout.advantages.clone()
    flat[:4] = 0.0
    flat[6] = 0.0
    rollout = replace(rollout, advantages=flat)
    _perturb(engine.network)
    skipped = gradient(session, engine, rollout)
    keep = table.useful_rows
    table.useful_rows = lambda rows, *_: rows
    kept = gradient(session, engine, rollout)
    table.useful_rows = keep
    return skipped, kept


def test_rollouts_without_advantage_are_skipped_and_change_nothing():
    (skipped, grads), (kept, whole) = run_ranks(1, _skip_or_not)[0]
    assert (skipped["rows"], kept["rows"]) == (14, 24)
    assert skipped["loss"] == pytest.approx(kept["loss"], rel=1e-6)
    assert relative_error(grads, whole) < 1e-6


def _with_and_without_kl():
    plain, engine = open_session("algorithm.allocation=equal")
    rollout, _ = collect_rollout(plain, engine, 0)
    rollout = replace(rollout, advantages=rollout.advantages.index_fill(0, torch.arange(4), 0.0))
    without = gradient(plain, engine, rollout)
    settings = plain.run.settings
    algorithm = replace(settings.algorithm, kl_coefficient=0.3)
    run = replace(plain.run, settings=replace(settings, algorithm=algorithm))
    session = replace(plain, run=run)
    return gradient(session, engine, rollout, _reference(session)), without


def test_kl_is_nothing_at_the_first_update_and_keeps_every_row():
    (metrics, grads), (_, without) = run_ranks(1, _with_and_without_kl)[0]
    assert metrics["kl"] == 0
    assert metrics["rows"] == 24
    assert relative_error(grads, without) < 1e-5


def _update_with_a_broken(part, overrides):
    """Break a weight, or only a gradient, on the last rank; say what was said and what moved."""
    session, engine = open_session(*overrides, world_size=dist.get_world_size())
    rollout, _ = collect_rollout(session, engine, 0)
    weight = engine.network.chunks[0].output_layer.weight
    if session.run.ranks.rank == session.run.ranks.world_size - 1 and part == "weight":
        with torch.no_grad():
            weight[3, 0] = float("nan")
    elif session.run.ranks.rank == session.run.ranks.world_size - 1:
        weight.register_hook(lambda grad: grad * float("inf"))
    before = [p.detach().clone() for _, p in engine.network.named_parameters()]
    with pytest.raises(RuntimeError) as error:
        update_policy(session, engine, rollout, None)
    after = [p for _, p in engine.network.named_parameters()]
    pairs = zip(before, after, strict=True)
    return str(error.value), all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in pairs)


@pytest.mark.parametrize("part", ["weight", "gradient"])
@pytest.mark.parametrize("layout", [[], ["parallel.tensor=2"]], ids=["dp2", "tp2"])
def test_what_is_not_finite_on_one_rank_stops_all_with_the_weights_as_they_were(part, layout):
    what = "the loss is not finite" if part == "weight" else "the gradient is not finite"
    for said, is_unchanged in run_ranks(2, _update_with_a_broken, part, layout):
        assert what in said and said.splitlines()[0].endswith("no weights were changed")
        assert is_unchanged
