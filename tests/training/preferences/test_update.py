"""Preference pairs: loss and gradient equal the formula, on any layout; shared masks cut noise."""

import zlib

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from agrpo_megatron.checkpoint.start import load_start_weights
from agrpo_megatron.megatron.network import build_network
from agrpo_megatron.megatron.weights import export_hf
from agrpo_megatron.text.replies import TokenRow
from agrpo_megatron.training.preferences.loss import as_pairs, pair_rows, row_elbos
from agrpo_megatron.training.preferences.update import (
    held_out_metrics,
    score_pairs,
    tangent,
)
from agrpo_megatron.training.step import optimizer_step
from agrpo_megatron.training.supervised.drawn import join_rows
from agrpo_megatron.training.update import APART
from tests.megatron.literal import literal_logits
from tests.ranks import run_ranks
from tests.training.test_blocks import _mask
from tests.training.tiny import open_session

COMMON = [
    "sft.loss=vrpo",
    "sft.data=unused",
    "sft.iterations=1",
    "sft.preferences.masks=3",
    "train.token_budget=50",
]
BLOCK_MODEL = ["model.attention=block_causal", "model.block_length=4"]
KINDS = {
    "vrpo": [],
    "masks of their own": ["sft.preferences.shared_masks=false"],
    "published counts": ["sft.preferences.states=random_count", "sft.preferences.beta=0.7"],
    "smoothed labels": ["sft.preferences.label_smoothing=0.2"],
    "with the chosen text": ["sft.preferences.chosen_weight=0.5", "sft.preferences.masks=1"],
    "blocks": [*BLOCK_MODEL, "sampling.block_origin=row"],
    "of a policy that is cached": ["sampling.policy=cached"],
}
LAYOUTS = {"tp2": (2, 3e-6), "pp2-cp2": (4, 3e-6), "dp2": (2, 1e-6)}


def _texts(seed=1):
    """Return three pairs: prompts of 3 to 6 tokens, answers of 1 to 9, one with a second turn."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(3, 39, (count,), generator=generator).numpy()

    texts = []
    for prompt, lengths in ((3, (5, 9)), (4, (8, 1)), (6, (4, 4))):
        start = ids(prompt)
        for length in lengths:
            trained = numpy.arange(prompt + length) >= prompt
            texts.append(TokenRow(numpy.concatenate([start, ids(length)]), trained))
    texts[1].trained[6:8] = False  # the user's second turn, which all states show
    return texts


def _perturb(network):
    """Change each parameter by a factor that its name gives, on whatever rank it is."""
    for name, parameter in network.named_parameters():
        parameter.data *= 1 + 0.3 * (zlib.crc32(name.encode()) % 100) / 100


def _opened(overrides):
    """Return a session, an engine whose weights have moved, and the reference."""
    size = dist.get_world_size()
    session, engine = open_session(*COMMON, *overrides, phase="sft", world_size=size)
    settings = session.run.settings
    reference = build_network(settings, session.run.ranks)
    load_start_weights(reference, settings)
    _perturb(engine.network)
    engine.init_main_weights({})
    return session, engine, reference


def _error(ours, theirs):
    """Return the norm of the difference of two gradients, relative to the second's."""
    gaps = torch.stack([(ours[name] - tensor).norm() for name, tensor in theirs.items()])
    return float(gaps.norm() / torch.stack([t.norm() for t in theirs.values()]).norm())


def _drawn(session, texts):
    run = session.run
    return join_rows(
        texts,
        [""] * len(texts),
        padding="block" if run.settings.model.has_blocks else "none",
        sampling=run.settings.sampling,
        eos_id=run.eos_id,
        device=run.ranks.device,
    )


def _update(session, engine, reference, texts):
    """Return metrics and whole gradients of one update, which is not applied."""
    caught = {}

    def step():
        grads = {n: p.main_grad.clone() for n, p in engine.network.named_parameters()}
        caught.update(export_hf(grads, session.run.settings.model, session.run.ranks))
        return True, 0.0, None

    engine.optimizer.step = step
    settings, pairs = session.run.settings, len(texts) // 2
    scored = score_pairs(
        engine.network, reference, _drawn(session, texts), settings, first=12, seed=0
    )
    loss = tangent(engine, scored, settings)
    metrics = optimizer_step(engine, scored.part.batches, loss=loss, examples=pairs)
    return metrics, caught


def _tensors(session, network):
    weights = {name: p.detach() for name, p in network.named_parameters()}
    exported = export_hf(weights, session.run.settings.model, session.run.ranks)
    return {name: tensor.double() for name, tensor in exported.items()}


def _literal_elbo(session, tensors, prompt, answer, hidden):
    """Return the sum of log-probs of hidden tokens, one forward per state; by block in blocks."""
    settings = session.run.settings
    places = hidden.nonzero()[:, 0].tolist()
    if not settings.model.has_blocks:
        row = torch.cat([prompt, answer.masked_fill(hidden, session.run.mask_id)])
        logits = literal_logits(tensors, settings.model, row)[len(prompt) :]
        logprobs = logits[:, : settings.model.vocab_size].log_softmax(-1)
        return sum(logprobs[place, answer[place]] for place in places)
    total = torch.zeros((), dtype=torch.float64)
    for place in places:
        at = len(prompt) + place
        block = at // 4
        is_open = (torch.arange(len(answer)) + len(prompt)) // 4 == block
        row = torch.cat([prompt, answer.masked_fill(hidden & is_open, session.run.mask_id)])
        end = min(len(row), 4 * block + 4)
        mask = _mask(end, block, len(prompt), settings)
        logits = literal_logits(tensors, settings.model, row[:end], mask=mask)
        logprobs = logits[at, : settings.model.vocab_size].log_softmax(-1)
        total = total + logprobs[answer[place]]
    return total


def _whole_blocks(session, text):
    """Return a text whose last block of four is full of end-of-text, for a block model."""
    missing = -len(text.ids) % 4 * session.run.settings.model.has_blocks
    ids = numpy.pad(text.ids, (0, missing), constant_values=session.run.eos_id)
    return TokenRow(ids, numpy.pad(text.trained, (0, missing), constant_values=True))


def _elbos(session, tensors, texts, seed):
    """Return the ELBO of each text: the mean over masks of length over count, times log-probs."""
    settings = session.run.settings
    texts = [_whole_blocks(session, text) for text in texts]
    drawn, ids = _drawn(session, texts), 12 + torch.arange(len(texts))
    answers = drawn.responses
    pairs = as_pairs(drawn.prompts, answers.tokens, answers.trained, ids, settings.sampling)
    rows = pair_rows(pairs, settings.sft.preferences, seed=seed)
    values = [torch.zeros((), dtype=torch.float64) for _ in texts]
    for row, number in enumerate(rows.rollout.tolist()):
        text, ids = texts[number], torch.from_numpy(texts[number].ids)
        first = text.prompt
        hidden = rows.hidden[row, : len(ids) - first]
        assert (hidden.numpy() <= text.trained[first:]).all(), "only trained tokens hide"
        length, count = int(text.trained.sum()), int(hidden.sum())
        value = _literal_elbo(session, tensors, ids[:first], ids[first:], hidden)
        values[number] = values[number] + length / count * value / settings.sft.preferences.masks
    return values


def _compare(overrides):
    session, engine, reference = _opened(overrides)
    texts, own = _texts(), session.run.settings.sft.preferences
    start = _elbos(session, _tensors(session, reference), texts, 0 if own.shared_masks else APART)
    metrics, grads = _update(session, engine, reference, texts)
    tensors = {n: t.requires_grad_() for n, t in _tensors(session, engine.network).items()}
    elbos = _elbos(session, tensors, texts, 0)
    loss, right = torch.zeros((), dtype=torch.float64), 0
    for chosen in range(0, len(texts), 2):
        gap = [elbos[number] - start[number] for number in (chosen, chosen + 1)]
        margin = own.beta * (gap[0] - gap[1])
        loss = loss - (1 - own.label_smoothing) * F.logsigmoid(margin)
        loss = loss - own.label_smoothing * F.logsigmoid(-margin)
        loss = loss - own.chosen_weight * elbos[chosen] / int(texts[chosen].trained.sum())
        right += float(margin) > 0
    loss = loss / 3
    loss.backward()
    literal = {name: tensor.grad for name, tensor in tensors.items()}
    assert metrics["preference/accuracy"] == pytest.approx(right / 3)
    found = float(sum(float(e) for e in elbos[::2]) / 3)
    assert metrics["elbo/chosen"] == pytest.approx(found, rel=1e-5)
    return abs(float(loss) - metrics["loss"]), _error(grads, literal)


def _compare_all():
    """Return the errors of each kind, all in one process, as starting it takes longest."""
    return {kind: _compare(overrides) for kind, overrides in KINDS.items()}


@pytest.fixture(scope="module")
def errors():
    return run_ranks(1, _compare_all)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_the_formula_text_by_text(errors, kind):
    loss, grads = errors[kind]
    assert loss < 1e-5 and grads < 1e-5, (loss, grads)


def _gradient(overrides):
    """Return metrics and gradients of one update, and the metrics of held-out pairs."""
    session, engine, reference = _opened(["model.num_layers=4", *overrides])
    texts, settings = _texts(), session.run.settings
    drawn = _drawn(session, _texts(seed=7))
    found = held_out_metrics(engine.network, reference, drawn, settings)
    return *_update(session, engine, reference, texts), found


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, _gradient, ["train.token_budget=400"])[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_nothing(alone, layout):
    ranks, bound = LAYOUTS[layout]
    expected, whole, held = alone
    overrides = [] if layout == "dp2" else [f"parallel={layout}"]
    for metrics, grads, found in run_ranks(ranks, _gradient, overrides):
        assert _error(grads, whole) < bound, _error(grads, whole)
        for ours, theirs in ((metrics, expected), (found, held)):
            assert ours.keys() >= {"loss", "preference/accuracy", "elbo/variance"}
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


def _spreads():
    """Return what `_spread` finds with shared masks and with masks of their own."""
    return _spread([]), _spread(["sft.preferences.shared_masks=false"])


def _spread(overrides):
    """Return the variance of margins over 30 draws of masks, and the mean of its estimates."""
    session, engine, reference = _opened(["sft.preferences.states=random_count", *overrides])
    texts, margins, estimates = _texts(), [], []
    drawn, settings = _drawn(session, texts), session.run.settings
    for draw in range(30):
        first = draw * len(texts)
        found = score_pairs(engine.network, reference, drawn, settings, first=first, seed=0)
        shares = row_elbos(found.logprobs, found.part.scored) - found.reference
        gaps = shares[..., 0] - shares[..., 1]
        margins.append(gaps.sum(0))
        estimates.append(len(gaps) * gaps.var(0))
    return float(torch.stack(margins).var(0).sum()), float(torch.stack(estimates).mean(0).sum())


def test_shared_masks_lower_the_variance_of_margins():
    """The spread within an update estimates it: masks are independent (`random_count`)."""
    (shared, estimate), (apart, estimate_apart) = run_ranks(1, _spreads)[0]
    assert shared < 0.5 * apart
    assert estimate == pytest.approx(shared, rel=0.3)
    assert estimate_apart == pytest.approx(apart, rel=0.3)
