"""A vocabulary sharded over two ranks gives the tokens and numbers that one shard gives."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion import draw as drawing
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.draw import LogitsForward, draw_tokens
from agrpo_megatron.diffusion.logprobs import (
    Vocabulary,
    exact_kl,
    policy_logits,
    shard_logprobs,
    token_logprobs,
)
from agrpo_megatron.diffusion.sampler import sample
from tests.diffusion.hashed import PADDED, SAMPLINGS, HashedModel, prompts_of
from tests.ranks import run_ranks

torch.set_num_threads(1)
RANKS = 2
ROWS = 40
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

# (true size, padded size, forbidden ids): padding on one shard, on a shard and a half, or nearly
# everywhere; the mask token on the first shard or on the second.
VOCABULARIES = {
    "mask on the first shard": (31, 40, (3,)),
    "mask on the second shard": (31, 40, (30,)),
    "second shard is all padding": (18, 40, (17,)),
    "first shard has one token left": (22, 40, tuple(range(1, 20))),
    "larger than the first candidates": (700, 704, (699,)),
}
POLICIES = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "tempered": {"temperature": 0.7, "confidence": "untempered"},
    "top-k": {"top_k": 5, "temperature": 1.2},
    "top-k wider than a shard": {"top_k": 30},
    "top-p": {"top_p": 0.8},
    "top-p that widens its candidates": {"top_p": 0.97, "temperature": 2.0},
    "top-k and top-p": {"top_k": 8, "top_p": 0.7, "confidence": "untempered"},
}
DTYPES = (torch.float32, torch.float64)
NUMBERS = ("logprobs", "entropies", "spreads", "confidences", "scored", "scored entropies")


def logits_of(name, dtype):
    size, padded, forbidden = VOCABULARIES[name]
    generator = torch.Generator().manual_seed(size)
    logits = 2 * torch.randn(ROWS, padded, generator=generator, dtype=torch.float64)
    logits[:, size:] += 30
    logits[:, list(forbidden)] += 30
    return logits.to(dtype)


def numbers(name, policy, dtype, rank, ranks):
    """Draw on one shard, and score the drawn tokens with their gradient; all by shard."""
    size, padded, forbidden = VOCABULARIES[name]
    width = padded // ranks
    group = dist.group.WORLD if ranks > 1 else None
    vocab = Vocabulary(size, start=rank * width, forbidden=forbidden, group=group)
    sampling = SamplingSettings(**POLICIES[policy])
    shard = logits_of(name, dtype)[:, rank * width : (rank + 1) * width].clone()
    keys = noise.noise_key(0, noise.TOKENS, torch.arange(ROWS))
    draw = draw_tokens(shard, keys, vocab=vocab, sampling=sampling)
    shard.requires_grad_()
    logits = policy_logits(shard, vocab, temperature=sampling.temperature)
    scored, entropies = token_logprobs(
        logits, draw.tokens, vocab=vocab, support_ids=draw.support_ids
    )
    (scored * torch.linspace(-1, 2, ROWS).to(dtype)).sum().backward()
    own = shard.detach().clone().requires_grad_()
    target = shard_logprobs(policy_logits(shard.detach().flip(0), vocab), vocab)
    kl = exact_kl(policy_logits(own, vocab, temperature=sampling.temperature), target, vocab)
    (kl * torch.linspace(-1, 2, ROWS).to(dtype)).sum().backward()
    return {
        "kl": kl.detach(),
        "gradient of the kl": own.grad,
        "tokens": draw.tokens,
        "support": draw.support_ids,
        "logprobs": draw.logprobs,
        "entropies": draw.entropies,
        "spreads": draw.spreads,
        "confidences": draw.confidences,
        "scored": scored.detach(),
        "scored entropies": entropies,
        "gradient": shard.grad,
    }


def case_names():
    return [(v, p, d) for v in VOCABULARIES for p in POLICIES for d in DTYPES]


def _every_case():
    rank = dist.get_rank()
    drawing.MAX_LOGITS = 11 * 20  # some rows at a time, where one shard alone has them all at once
    return {case: numbers(*case, rank, RANKS) for case in case_names()}


@functools.cache
def sharded():
    return run_ranks(RANKS, _every_case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_two_shards_equal_one(name, policy, dtype):
    alone = numbers(name, policy, dtype, 0, 1)
    parts = [result[name, policy, dtype] for result in sharded()]
    for part in parts:
        assert torch.equal(part["tokens"], alone["tokens"])
        assert (part["support"] is None) == (alone["support"] is None)
        if alone["support"] is not None:
            assert torch.equal(part["support"], alone["support"])
        for key in NUMBERS:
            assert float((part[key] - alone[key]).abs().max()) < TOLERANCE[dtype]
        assert torch.allclose(part["kl"], alone["kl"], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    size, _, forbidden = VOCABULARIES[name]
    assert int(alone["tokens"].max()) < size
    assert not torch.isin(alone["tokens"], torch.tensor(forbidden)).any()
    for key in ("gradient", "gradient of the kl"):
        gradient = torch.cat([part[key] for part in parts], 1)
        error = (gradient - alone[key]).abs().max() / alone[key].abs().max()
        assert float(error) < 2 * TOLERANCE[dtype], key
        assert float(gradient[:, size:].abs().max()) == 0
        assert float(gradient[:, list(forbidden)].abs().max()) == 0


def test_the_exact_kl_is_the_sum_over_the_vocabulary():
    """Two ids: p = (3/4, 1/4) from q = (1/2, 1/2) is 3/4 log 3/2 + 1/4 log 1/2; as autograd."""
    vocab, pair = Vocabulary(2), torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64).log()
    target = shard_logprobs(pair[1:], vocab)
    assert float(exact_kl(pair[:1], target, vocab)) == pytest.approx(0.130812035941, abs=1e-12)
    size, _, _ = VOCABULARIES["mask on the second shard"]
    logits = logits_of("mask on the second shard", torch.float64)[:, :size]
    vocab, target = Vocabulary(size), logits.flip(0).log_softmax(-1)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    exact_kl(ours, target, vocab).square().sum().backward()
    logprobs = theirs.log_softmax(-1)
    (logprobs.exp() * (logprobs - target)).sum(-1).square().sum().backward()
    assert float((ours.grad - theirs.grad).abs().max()) < 1e-10


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["mask on the second shard", "larger than the first candidates"])
def test_one_shard_equals_the_definition(name, policy):
    """Softmax, top-k, top-p and entropy written out for one row at a time, in float64."""
    size, _, forbidden = VOCABULARIES[name]
    got, sampling = numbers(name, policy, torch.float64, 0, 1), SamplingSettings(**POLICIES[policy])
    for row, raw in enumerate(logits_of(name, torch.float64)):
        allowed = [v for v in range(size) if v not in forbidden]
        untempered = {v: float(x) for v, x in zip(allowed, raw[allowed].softmax(0), strict=True)}
        scale = sampling.temperature or 1.0
        probs = (raw[allowed] / scale).softmax(0).tolist()
        ranked = sorted(zip(probs, allowed, strict=True), reverse=True)
        if sampling.temperature > 0:
            ranked = ranked[: sampling.top_k]
            total, mass, kept = sum(p for p, _ in ranked), 0.0, []
            for p, v in ranked:
                if mass <= sampling.top_p:
                    kept.append((p, v))
                mass += p / total
            ranked = kept
        support = [v for _, v in ranked]
        renormalised = torch.tensor([p for p, _ in ranked], dtype=torch.float64)
        renormalised /= renormalised.sum()
        token = int(got["tokens"][row])
        expected = float(renormalised[support.index(token)].log())
        assert float(got["logprobs"][row]) == pytest.approx(expected, abs=1e-12)
        entropy = -float((renormalised * renormalised.log()).sum())
        assert float(got["entropies"][row]) == pytest.approx(entropy, abs=1e-12)
        spread = 1 - float(renormalised.square().sum())
        assert float(got["spreads"][row]) == pytest.approx(spread, abs=1e-12)
        if got["support"] is not None:
            assert [v for v in got["support"][row].tolist() if v >= 0] == support
        if sampling.confidence == "untempered":
            own = float(torch.tensor(untempered[token]).log())
            assert float(got["confidences"][row]) == pytest.approx(own, abs=1e-6)
        else:
            assert torch.equal(got["confidences"], got["logprobs"])
        if sampling.temperature == 0:
            assert token == support[0]


@pytest.mark.parametrize("gap", [5.0, 12.0, 17.0, 20.0, 60.0, 85.0])
@pytest.mark.parametrize("top_k", [None, 3])
def test_spreads_of_sure_tokens_are_not_rounded_away(gap, top_k):
    """1 - sum p^2 in float32 would be 0 from a gap of 17 nats on."""
    logits = torch.tensor([[0.0, gap, -1.0, 0.5]])
    draw = draw_tokens(
        logits,
        torch.zeros(1).long(),
        vocab=Vocabulary(4),
        sampling=SamplingSettings(top_k=top_k),
    )
    ids = torch.tensor([[1, 0, 2, 3]]) if draw.support_ids is None else draw.support_ids
    kept = [i for i in ids[0, 1:].tolist() if i >= 0]
    others = (logits[0].double() - gap).exp()[kept]
    expected = 2 * others.sum() + others.sum() ** 2 - others.square().sum()
    expected /= (1 + others.sum()) ** 2
    assert float(draw.spreads) == pytest.approx(float(expected), rel=0.3 if gap > 12 else 1e-2)


@pytest.mark.parametrize("gap", [1.0, 300.0])
def test_only_a_single_candidate_has_no_spread(gap):
    logits = torch.tensor([[0.0, gap]])
    for options, is_single in (({}, False), ({"top_k": 2}, False), ({"top_k": 1}, True)):
        sampling = SamplingSettings(**options)
        draw = draw_tokens(logits, torch.zeros(1).long(), vocab=Vocabulary(2), sampling=sampling)
        assert (float(draw.spreads) == 0) == is_single


SAMPLED = [SAMPLINGS[name] for name in SAMPLINGS if name.startswith("low_confidence")]


def _trajectories():
    rank, width = dist.get_rank(), PADDED // RANKS
    model = HashedModel()
    context = model.context()
    vocab = replace(context.vocab, start=rank * width, group=dist.group.WORLD)
    columns = slice(rank * width, (rank + 1) * width)
    forward = LogitsForward(lambda rows: model.logits(rows)[:, columns])
    context = replace(context, vocab=vocab, forward=forward)
    return [
        sample(prompts_of(6), torch.arange(6), context=context, sampling=sampling)
        for sampling in SAMPLED
    ]


def test_trajectories_of_two_shards_equal_those_of_one():
    ranks = run_ranks(RANKS, _trajectories)
    for sampling, *parts in zip(SAMPLED, *ranks, strict=True):
        alone = sample(
            prompts_of(6), torch.arange(6), context=HashedModel().context(), sampling=sampling
        )
        for part in parts:
            for field in ("tokens", "unmask_step", "num_steps"):
                assert torch.equal(getattr(part, field), getattr(alone, field))
            for field in ("logprobs", "entropies", "spreads"):
                gap = (getattr(part, field) - getattr(alone, field)).abs().max()
                assert float(gap) < 1e-6
            if alone.support_ids is not None:
                assert torch.equal(part.support_ids, alone.support_ids)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_rows_drawn_in_parts_are_those_drawn_at_once(monkeypatch, name, policy, rows):
    case = (name, policy, torch.float32, 0, 1)
    whole = numbers(*case)
    monkeypatch.setattr(drawing, "MAX_LOGITS", rows * VOCABULARIES[name][1])
    for key, value in numbers(*case).items():
        assert (value is None) == (whole[key] is None)
        assert value is None or torch.equal(value, whole[key]), key


def tied_logits():
    return logits_of("mask on the first shard", torch.float32).mul(0.5).round()[:, :39]


def _tied(rank, ranks):
    width = 40 // ranks
    group = dist.group.WORLD if ranks > 1 else None
    vocab = Vocabulary(39, start=rank * width, group=group)
    padded = torch.nn.functional.pad(tied_logits(), (0, 1), value=9.0)
    shard = padded[:, rank * width : (rank + 1) * width]
    keys = noise.noise_key(0, noise.TOKENS, torch.arange(ROWS))
    return [
        draw_tokens(shard, keys, vocab=vocab, sampling=SamplingSettings(**policy))
        for policy in POLICIES.values()
    ]


def _tied_on_ranks():
    return _tied(dist.get_rank(), RANKS)


def test_equal_logits_are_ranked_by_id_on_any_number_of_shards():
    """In bfloat16 many logits are equal, and one of them is the k-th; the lowest id is kept."""
    alone = _tied(0, 1)
    for draws in run_ranks(RANKS, _tied_on_ranks):
        for one, two in zip(alone, draws, strict=True):
            assert torch.equal(one.tokens, two.tokens)
            if one.support_ids is not None:
                assert torch.equal(one.support_ids, two.support_ids)
    ranked = tied_logits().sort(descending=True, stable=True).indices
    for policy, draw in zip(POLICIES, alone, strict=True):
        if policy == "greedy":
            assert torch.equal(draw.tokens, ranked[:, 0])
        elif draw.support_ids is not None:
            kept = draw.support_ids >= 0
            width = draw.support_ids.shape[1]
            assert torch.equal(draw.support_ids[kept], ranked[:, :width][kept])
