"""A model on one rank or several: the same completions and scores, and what a request may ask."""

import datetime
import os

import pytest
import torch

from agrpo_megatron.evaluation.evaluate import EVALUATION_IDS
from agrpo_megatron.evaluation.open import complete
from agrpo_megatron.evaluation.target import find_target
from agrpo_megatron.serving.likelihood import Scoring
from agrpo_megatron.serving.model import (
    Generation,
    follow,
    lead,
    leading,
    open_model,
    resolved_model,
)
from agrpo_megatron.serving.requests import check_room, noise_index, request_sampling
from tests.cli.test_evaluate import HF
from tests.ranks import run_ranks
from tests.serving.test_likelihood import SETTINGS

PROMPTS = ["7+5=", "12", "a long prompt of words"]


def resolved(*changes, world_size=1):
    found = find_target(HF, overrides=[*SETTINGS, *changes])
    return resolved_model(found.settings, world_size=world_size)


def _used(*changes):
    """Complete prompts and score texts on all ranks; returns what the main rank got."""
    ranks = int(os.environ["WORLD_SIZE"])
    chosen = resolved(*changes, world_size=ranks)
    with open_model(chosen, None) as model:
        if os.environ["RANK"] != "0":
            follow(model)
            return None
        if model.control is not None:  # the others wait for jobs as long as it takes
            gloo = model.control._get_backend(torch.device("cpu"))
            assert gloo.options._timeout > datetime.timedelta(days=30)
        with leading(model):
            sampling = request_sampling(chosen.settings, temperature=1.0, most=12)
            ids = [chosen.tokenizer.encode(prompt) for prompt in PROMPTS]
            noise = [noise_index(seed, 0) for seed in range(3)]
            parts = []
            job = Generation(ids, noise, sampling, [[], [], []])
            whole = lead(model, job, parts.append)
            stops = [[chosen.tokenizer.decode(whole.tokens[0, :8].tolist())[-2:]], [], []]
            ended = lead(model, Generation(ids, noise, sampling, stops))
            scores = lead(model, Scoring(ids[:2], [ids[2][:9], ids[2][:2]], samples=4))
            return whole.tokens.tolist(), parts, ended, [score.logprob for score in scores]


def test_every_layout_writes_the_same_and_blocks_come_as_they_end():
    (one,) = run_ranks(1, _used)
    tokens, parts, ended, scores = one
    assert len(tokens[0]) == 16, "twelve tokens are two blocks of eight"
    mine = [part for part in parts if part.row == 0]
    sizes = [(len(part.ids), part.is_whole) for part in mine]
    assert sizes == [
        (8, False),
        (16, False),
        (16, True),
    ]
    assert all(tokens[part.row][: len(part.ids)] == part.ids for part in parts)
    assert ended.num_steps.tolist() == [2, 4, 4], "a stop text ends its row after its block"
    assert ended.tokens[1:].tolist() == tokens[1:]
    for layout in ("parallel=tp2", "parallel=dp2", "parallel=pp2"):
        found, _ = run_ranks(2, _used, layout)
        assert found[0] == tokens and found[2].num_steps.tolist() == [2, 4, 4]
        assert found[3] == pytest.approx(scores, abs=1e-4)


def _as_sampled():
    chosen = resolved()
    with open_model(chosen, None) as model:
        by_sample = complete(model.run, model.network, PROMPTS[:1]).tokens.tolist()
        ids = [chosen.tokenizer.encode(PROMPTS[0])]
        job = Generation(ids, [noise_index(0, 0)], request_sampling(chosen.settings), [[]])
        return by_sample, lead(model, job).tokens.tolist()


def test_seed_0_is_what_agrpo_sample_writes():
    by_sample, by_request = run_ranks(1, _as_sampled)[0]
    assert by_sample == by_request
    assert noise_index(0, 0) == EVALUATION_IDS and noise_index(5, 0) == EVALUATION_IDS + 5
    assert noise_index(None, 0) != noise_index(None, 0)


def test_a_length_becomes_whole_blocks_with_as_many_steps_per_token():
    settings = resolved().settings  # 16 tokens in blocks of 8, 4 steps
    for most, length, steps in ((None, 16, 4), (1, 8, 2), (9, 16, 4), (40, 40, 10)):
        found = request_sampling(settings, most=most)
        assert (found.completion_length, found.denoising_steps) == (length, steps)
    finer = request_sampling(settings, most=16, block_length=4, denoising_steps=16, temperature=0.5)
    assert (finer.block_length, finer.denoising_steps, finer.temperature) == (4, 16, 0.5)
    assert request_sampling(settings, top_p=None) == settings.evaluation_sampling


WRONG = {
    "most": (0, "0 tokens in blocks of 8: both must be at least 1"),
    "denoising_steps": (3, "denoising_steps=3 must be a multiple of the 2 blocks"),
    "unmasking": ("bernoulli", "unmasking=bernoulli takes its rates from Dream's time"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_sampler_that_cannot_be_is_refused(key):
    value, said = WRONG[key]
    with pytest.raises(ValueError, match=said):
        request_sampling(resolved().settings, **{key: value})


def test_a_prompt_must_fit_and_not_be_empty():
    settings = resolved("model.max_sequence_length=40").settings
    sampling = request_sampling(settings)
    check_room(settings, [5] * 24, sampling)
    with pytest.raises(
        ValueError, match="prompt has 25 tokens, .* leaves 24 in addition to the completion's 16"
    ):
        check_room(settings, [5] * 25, sampling)
    with pytest.raises(ValueError, match="the prompt is empty"):
        check_room(settings, [], sampling)
