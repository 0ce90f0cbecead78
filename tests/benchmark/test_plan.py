"""The command line of a benchmark becomes settings; wrong input is refused with a fix."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from agrpo_megatron.benchmark import ours
from agrpo_megatron.benchmark.plan import PRESETS, make_plan

GIVEN = {
    "preset": None,
    "model": None,
    "layers": None,
    "hidden": None,
    "heads": None,
    "ffn": None,
    "vocab": None,
    "batch": 4,
    "prompt_length": 8,
    "completion_length": 16,
    "block_length": None,
    "denoising_steps": None,
    "unmasking": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "mc_samples": 2,
    "zero_advantage": 0.0,
    "threads": 1,
    "precision": "fp32",
    "repeats": 1,
    "reference": False,
    "ceiling": False,
}
AUTO = ["algorithm.mc_samples=auto", "algorithm.prompts_per_iteration=2"]


def plan_of(kind, *overrides, **options):
    return make_plan(kind, {**GIVEN, **options}, overrides)


def test_options_and_overrides_become_settings():
    options = {"layers": 2, "vocab": 64, "top_k": 5, "denoising_steps": 4}
    plan = plan_of("iteration", "sampling.top_k=7", zero_advantage=0.5, **options)
    model, sampling = plan.settings.model, plan.settings.sampling
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (2, 128, 64)
    assert (model.mask_token_id, model.eos_token_id) == (63, 62)
    assert (sampling.top_k, sampling.denoising_steps) == (7, 4)
    assert plan.settings.train.token_budget == 4 * 24
    assert plan.settings.algorithm.draws == 2 and plan.settings.algorithm.group_size == 4
    assert (plan.row_length, plan.zero_rollouts) == (24, 2)


def test_presets_are_the_published_shapes():
    model = plan_of("rollout", preset="llada-8b").settings.model
    assert (model.num_layers, model.vocab_size, model.mask_token_id) == (32, 126464, 126336)
    assert plan_of("rollout", preset="llada-8b/8").settings.model.num_layers == 4
    blocks = plan_of("rollout", preset="sdar-8b").settings
    assert blocks.model.has_blocks and blocks.sampling.block_length == blocks.model.block_length
    assert set(PRESETS) == {"tiny", "llada-8b", "llada-8b/8", "sdar-8b"}


@pytest.mark.parametrize(
    ("kind", "options", "overrides", "said"),
    [
        ("rollout", {"batch": 0}, [], "--batch=0 must be at least 1; use"),
        ("train-step", {"batch": 1}, [], "--batch=1 must be at least 2: an advantage needs"),
        ("rollout", {"repeats": 0}, [], "--repeats=0 must be at least 1"),
        ("rollout", {"preset": "tiny", "model": "x"}, [], "--model=x both name a model; leave"),
        ("rollout", {"model": "x", "layers": 2}, [], "--layers=2 cannot change the shape"),
        ("rollout", {"vocab": 3}, [], "--vocab=3 must be at least 4"),
        ("rollout", {"zero_advantage": 0.4}, [], "--zero-advantage=0.4 has no meaning"),
        ("iteration", {"zero_advantage": 1.0}, [], "must be at least 0 and below 1"),
        ("iteration", {"zero_advantage": 0.75}, [], "leaves one of 4 rollouts"),
        ("rollout", {"layers": 0}, [], "model.num_layers=0 must be at least 1"),
        ("rollout", {"block_length": 5}, [], "sampling.block_length=5 does not divide"),
        ("rollout", {"model": "missing"}, [], "model.load=missing is not a directory"),
        ("rollout", {}, ["model.eos_token_id=600"], "outside model.vocab_size=512; use an id"),
        ("rollout", {}, ["model.max_sequence_length=20"], "make 24, more than"),
        ("train-step", {}, ["algorithm.name=espo"], "algorithm.name=espo is not measured"),
        ("train-step", {}, AUTO, "algorithm.mc_samples=auto is not"),
        ("train-step", {}, ["algorithm.group_size=3"], "group_size=3 does not divide --batch=4"),
        ("train-step", {}, ["algorithm.kl_coefficient=0.1"], "needs a frozen policy"),
        (
            "iteration",
            {},
            ["train.async_steps=1", "algorithm.rollout_correction=2"],
            "made-up rewards take no time; use train.async_steps=0",
        ),
    ],
)
def test_wrong_input_is_refused(kind, options, overrides, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        plan_of(kind, *overrides, **options)


@pytest.mark.parametrize(
    ("options", "overrides", "said"),
    [
        ({"preset": "sdar-8b"}, [], "model.family=sdar: --reference is LLaDA's published"),
        (
            {"precision": "fp8"},
            [],
            "precision=fp8: --reference .* precision=fp32 or bf16;",
        ),
        ({"unmasking": "margin"}, [], "with sampling.unmasking=random or leftmost or low_conf"),
        ({}, ["sampling.policy=cached"], "with sampling.policy=exact"),
        ({}, ["sampling.threshold=0.9"], "with sampling.threshold=null"),
        ({}, ["lora.rank=4"], "lora.rank=4: --reference"),
    ],
)
def test_what_the_reference_lacks_is_refused(options, overrides, said):
    plan_of("rollout", *overrides, **options)  # ours has it
    with pytest.raises(ValueError, match=said):
        plan_of("rollout", *overrides, reference=True, **options)


def test_a_rollout_has_the_memory_of_a_runs_rollout(monkeypatch):
    """`rollout.release` frees within it what it frees in a run."""
    freed: list[bool] = []

    class Engine:
        @contextmanager
        def sampling(self):
            freed.append(True)
            yield "network"
            freed.append(False)

    def sample_ids(_, network, *__, **___):
        assert freed == [True]
        return network, None

    monkeypatch.setattr(ours, "sample_ids", sample_ids)
    engine: Any = Engine()
    ids = torch.arange(4)
    mine = ours.Ours(plan_of("rollout", "rollout.release=optimizer"), engine, ids[:, None], ids)
    assert ours.sample(mine)[0] == "network" and freed == [True, False]
