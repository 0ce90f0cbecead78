"""Any torch module as the network of the sampler: batches, masks, shifts, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from agrpo_megatron.config.settings import UNMASKING
from agrpo_megatron.diffusion import SamplerHooks, SamplingSettings, module_context, sample

VOCABULARY, MASK, EOS = 12, 11, 10
SAMPLING = SamplingSettings(completion_length=8, block_length=4, denoising_steps=4)
PROMPTS = [torch.tensor(ids) for ids in ([1], [2, 3, 4], [5, 6], [7, 8, 9], [1, 2, 3, 4, 5])]


class Attends(nn.Module):
    """One layer of attention whose logits depend on every token; counts its passes."""

    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(32, width)
        self.head = nn.Linear(width, VOCABULARY)
        self.passes = 0
        self.eval()

    def logits(self, ids, mask):
        self.passes += 1
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        scores = x @ x.transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, float("-inf"))
        return self.head(x + scores.softmax(-1) @ x)


class Plain(Attends):
    def forward(self, ids):
        return self.logits(ids, None)


class Honours(Attends):
    def forward(self, ids, attention_mask=None):
        return self.logits(ids, attention_mask)


class Ignores(Attends):
    """As the first modelling code of LLaDA-8B does."""

    def forward(self, ids, attention_mask=None):
        return self.logits(ids, None)


class Dilutes(Attends):
    """Which token fills a row has no effect, and how many do: the mean is over the padded row."""

    def forward(self, ids, attention_mask=None):
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        return self.logits(ids, mask) * mask.float().mean(1)[:, None, None]


def complete(module, prompts, numbers, **options):
    context = module_context(
        module, mask_id=MASK, eos_id=EOS, vocab_size=VOCABULARY, seed=3, **options
    )
    return sample(prompts, torch.tensor(numbers), context=context, sampling=SAMPLING)


@pytest.mark.parametrize(
    ("kind", "passes"),
    [(Honours, 4 + 3), (Plain, 4 * 4), (Ignores, 4 * 4 + 2), (Dilutes, 4 * 4 + 3)],
)
def test_rows_of_different_lengths_have_the_completions_of_single_rows(kind, passes):
    """Four steps of one padded batch, or of four lengths; a mask is checked by three passes once.

    The third is of a single row, without padding. The five prompts have four lengths. Padding
    would change the logits of a module without a mask.
    """
    module = kind()
    together = complete(module, PROMPTS, [0, 1, 2, 3, 4])
    assert module.passes == passes
    for number, prompt in enumerate(PROMPTS):
        alone = complete(Plain(), [prompt], [number])
        assert torch.equal(alone.tokens[0], together.tokens[number])
        assert torch.equal(alone.unmask_step[0], together.unmask_step[number])
        assert (alone.logprobs[0] - together.logprobs[number]).abs().max() < 1e-6


def test_rows_of_one_length_need_no_mask():
    module = Honours()
    complete(module, [PROMPTS[1], PROMPTS[3]], [0, 1])
    assert module.passes == 4, "one pass for each of four steps"


def test_a_shifted_module_predicts_from_the_token_before():
    class Shifted(Plain):
        def forward(self, ids):
            return self.logits(ids, None).roll(-1, dims=1)

    plain, shifted = (
        complete(Plain(), PROMPTS, range(5)),
        complete(Shifted(), PROMPTS, range(5), shift=True),
    )
    assert torch.equal(plain.tokens, shifted.tokens)


@pytest.mark.parametrize("unmasking", sorted(set(UNMASKING) - {"bernoulli"}))
def test_a_model_of_transformers_is_sampled_in_every_order(unmasking):
    """What was recorded is what a new pass over the rebuilt state gives: here by hand, greedily."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCABULARY, intermediate_size=16, **size)
    module = BertForMaskedLM(config).eval()
    context = module_context(module, mask_id=MASK)
    sampling = SamplingSettings(
        completion_length=4, block_length=4, denoising_steps=4, unmasking=unmasking, temperature=0.7
    )
    found = sample(PROMPTS[:2], torch.arange(2), context=context, sampling=sampling)
    assert not (found.tokens == MASK).any()
    for row, prompt in enumerate(PROMPTS[:2]):
        for place in range(4):
            hidden = found.unmask_step[row] >= found.unmask_step[row, place]
            state = torch.cat([prompt, found.tokens[row].masked_fill(hidden, MASK)])
            logits = module(state[None]).logits[0, len(prompt) + place, :MASK]
            logprob = (logits.detach() / 0.7).log_softmax(-1)[found.tokens[row, place]]
            assert abs(float(logprob - found.logprobs[row, place])) < 1e-5


def _context(module, **changes):
    return module_context(module, **{"mask_id": MASK, "vocab_size": VOCABULARY, **changes})


ENDS = SamplerHooks(on_step=lambda state, rows: rows[:1])


def _complete(sampling=None, hooks=None, **changes):
    changed = replace(SAMPLING, **(sampling or {}))
    context = _context(Plain(), **changes)
    return sample(PROMPTS[:2], torch.arange(2), context=context, sampling=changed, hooks=hooks)


def test_a_hook_ends_rows_and_stop_tokens_do():
    """The rest of an ended row is end-of-text; so the two settings that are refused alone work."""
    assert (_complete(hooks=ENDS, eos_id=EOS).tokens == EOS).sum() >= 4
    every = tuple(range(VOCABULARY))
    found = _complete({"end_at_stop": True}, eos_id=EOS, stop_ids=every)
    assert (found.tokens[:, 4:] == EOS).all()
    drawn = _complete({"forbid_mask_token": False}, may_draw_mask=True)
    assert drawn.tokens.shape == (2, 8)


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda: module_context(Plain(), mask_id=3), "Plain has no config.vocab_size; give vocab_"),
        (lambda: _context(Plain(), mask_id=12), "mask_id=12 is not below vocab_size=12"),
        (lambda: _context(Plain(), eos_id=-1), "eos_id=-1 is not below vocab_size=12"),
        (lambda: _context(Plain(), token_budget=0), "token_budget=0 holds no token"),
        (lambda: _context(Plain(), stop_ids=(3, 12)), "stop_ids=12 is not below vocab_size=12"),
        (lambda: _context(Plain(), shift=True, block_length=4), "model.shift=true.*shift=false"),
        (lambda: complete(Plain(), PROMPTS, [0, 1]), r"tensor \[5\], int64, of one id for each of"),
        (lambda: complete(Plain(), PROMPTS[:2], [[3], [4]]), r"give a tensor \[2\], int64"),
        (lambda: _complete(block_length=2), "sampling.block_length=4 differs from .*use 2"),
        (lambda: _complete({"edit_threshold": 0.5}), "edit_threshold=0.5 is for .*use null"),
        (lambda: _complete(may_draw_mask=True), "forbid_mask_token=true.*forbid_mask_token=False"),
        (lambda: _complete({"end_at_stop": True}, eos_id=EOS), "end_at_stop=true.*stop_ids="),
        (lambda: _complete({"end_at_stop": True}, stop_ids=(3,)), "end_at_stop=true.*eos_id="),
        (lambda: _complete(hooks=ENDS), "SamplerHooks.on_step ends rows.*eos_id="),
        (lambda: complete(Plain(), PROMPTS[:2], [3, 3]), "none twice: they seed the noise"),
        (lambda: complete(Plain(), [[1, 2]], [0]), r"prompts\[0\]=\[1, 2\]: give a tensor of ids"),
        (lambda: complete(Plain(), [torch.tensor([1, 99])], [0]), "its ids must be below 12"),
        (lambda: complete(Plain().train(), PROMPTS, range(5)), "training mode.*call eval"),
        (
            lambda: complete(BertModel(BertConfig(vocab_size=12)).eval(), PROMPTS[:1], [0]),
            r"maps ids \[1, 9\] to BaseModelOutput.*AutoModelForMaskedLM",
        ),
        (
            lambda: sample(PROMPTS, torch.arange(5), context=_context(Plain()), sampling=SIX),
            "sampling.block_length=32 does not divide sampling.completion_length=6; use 3 or 6",
        ),
        (
            lambda: sample(
                PROMPTS,
                torch.arange(5),
                context=_context(Plain()),
                sampling=replace(SAMPLING, forbid_mask_token=False),
            ),
            "sampling.forbid_mask_token=false.*may_draw_mask=True",
        ),
        (
            lambda: sample(
                PROMPTS,
                torch.arange(5),
                context=_context(Plain()),
                sampling=SamplingSettings(unmasking="confidence"),
            ),
            "sampling.unmasking=confidence must be one of .*did you mean low_confidence",
        ),
    ],
)
def test_what_cannot_work_is_refused(attempt, said):
    with pytest.raises(ValueError, match=said):
        attempt()


SIX = SamplingSettings(completion_length=6, block_length=32, denoising_steps=6)
