"""Requests that wait: which are sampled together, in which order, and what a failure leaves."""

import queue
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from agrpo_megatron.config.settings import SamplingSettings, TokenizerSettings
from agrpo_megatron.serving import worker
from agrpo_megatron.serving.api import ApiError
from agrpo_megatron.serving.model import Part
from agrpo_megatron.serving.server import Front
from agrpo_megatron.serving.worker import Waiting, work
from agrpo_megatron.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TokenizerSettings())
WARM = SamplingSettings(completion_length=4, block_length=2)
COLD = replace(WARM, temperature=0.0)


def answered(monkeypatch, samplers, perform):
    """Return the deltas of requests that wait with these samplers; `perform` does their jobs."""
    model = SimpleNamespace(run=SimpleNamespace(tokenizer=TOKENIZER), control=None)
    monkeypatch.setattr(worker, "lead", lambda _, job, emit: perform(job, emit))
    waiting, sent = queue.SimpleQueue(), [[] for _ in samplers]
    for number, sampling in enumerate(samplers):
        waiting.put(Waiting([number], number, sampling, 4, (), sent[number].append))
    waiting.put(None)
    work(model, waiting)
    return sent


def test_equal_samplers_are_sampled_together_the_longest_waiting_first(monkeypatch):
    jobs, text = [], TOKENIZER.encode("abcd")

    def perform(job, emit):
        jobs.append((job.sampling, list(job.noise)))
        emit(Part(0, text[:2], is_whole=False))
        emit(Part(0, text, is_whole=True))  # the other rows are of other replicas
        return SimpleNamespace(tokens=torch.tensor([text] * len(job.prompts)))

    sent = answered(monkeypatch, [WARM, COLD, WARM, COLD, WARM], perform)
    assert jobs == [(WARM, [0, 2, 4]), (COLD, [1, 3])]
    assert [delta.text for delta in sent[0]] == ["ab", "cd"]
    assert [[delta.text for delta in deltas] for deltas in sent[1:]] == [["ab", "cd"]] + [
        ["abcd"]
    ] * 3
    assert all(deltas[-1].done.text == "abcd" for deltas in sent)


def test_a_failure_is_the_answer_of_its_requests_and_the_others_go_on(monkeypatch, capsys):
    def perform(job, emit):
        if job.sampling == WARM:
            raise RuntimeError("out of memory")
        return SimpleNamespace(tokens=torch.tensor([TOKENIZER.encode("abcd")]))

    failed, fine = answered(monkeypatch, [WARM, COLD], perform)
    assert [delta.failure for delta in failed] == ["RuntimeError: out of memory"]
    assert fine[-1].done.text == "abcd"
    assert "RuntimeError: out of memory" in capsys.readouterr().err, "the server says so, too"


def test_a_server_that_closes_answers_what_it_took_and_takes_no_more():
    front = Front(SimpleNamespace(), "tiny", None)
    front.take(["first", "second"])
    front.close()
    with pytest.raises(ApiError, match="the server is closing") as refused:
        front.take(["late"])
    assert refused.value.status == 503
    left = [front.waiting.get_nowait() for _ in range(front.waiting.qsize())]
    assert left == ["first", "second", None]
