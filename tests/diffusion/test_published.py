"""Golden numbers of the public LLaDA and AGRPO code, reproduced in plain torch.

`tests/fixtures/llada_tiny/README.md` says what the tensors are. The model is the one of
`tools/variance_cases.py`, in float64; the sampler, estimator and loss are the package's.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agrpo_megatron.config.settings import AlgorithmSettings, SamplingSettings
from agrpo_megatron.diffusion.draw import LogitsForward
from agrpo_megatron.diffusion.logprobs import policy_logits, token_logprobs
from agrpo_megatron.diffusion.sampler import SamplerContext, sample
from agrpo_megatron.estimators import losses
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.steps import draws_at, rows_at
from agrpo_megatron.types import Rollout
from tests.diffusion.batching import batches_of
from tools.variance_cases import below, stored_model, stored_trajectory

torch.set_num_threads(1)
FOLDER = Path(__file__).parent.parent / "fixtures" / "llada_tiny"
GOLDEN = load_file(FOLDER / "golden.safetensors")
SETTINGS = json.loads((FOLDER / "golden.json").read_text())
MASK, EOS = 159, 158


def test_logits():
    """Within 1e-5 of the largest logit, which is 17; the golden numbers are float32."""
    model = stored_model(FOLDER / "hf")
    logits = model.hidden(GOLDEN["logits.input_ids"]) @ model.weights["ff_out.weight"].T
    expected = GOLDEN["logits.logits"]
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("number", range(len(SETTINGS["sampler"])))
def test_sampler_reproduces_llada_token_for_token(number):
    options, model = SETTINGS["sampler"][number], stored_model(FOLDER / "hf")
    prompts = GOLDEN["sampler.prompt_ids"]
    sampling = SamplingSettings(
        completion_length=options["gen_length"],
        block_length=options["block_length"],
        denoising_steps=options["steps"],
        unmasking=options["remasking"],
        temperature=options["temperature"],
        confidence="untempered",
        early_end=False,
    )
    context = SamplerContext(
        LogitsForward(model.score), model.vocab, MASK, EOS, seed=0, token_budget=10**6
    )
    got = sample(list(prompts), torch.arange(len(prompts)), context=context, sampling=sampling)
    expected = GOLDEN[f"sampler.{number}.output_ids"][:, prompts.shape[1] :]
    assert torch.equal(got.tokens, expected)


def with_reference(batches, model, temperature):
    """Return the batches with the log-probs of the frozen reference filled in."""
    for batch in batches:
        logits = policy_logits(model.score(batch.rows), model.vocab, temperature=temperature)
        logprobs, _ = token_logprobs(logits, batch.targets, vocab=model.vocab)
        yield replace(batch, reference_logprobs=logprobs)


@pytest.mark.parametrize("token_budget", [60, 10**6])
@pytest.mark.parametrize("number", range(len(SETTINGS["agrpo"])))
def test_estimator_and_loss_reproduce_agrpo(number, token_budget):
    """Loss within 1e-5 and every gradient within 1e-4 relative, from the stored uniform numbers."""
    options, stored = SETTINGS["agrpo"][number], below(GOLDEN, f"agrpo.{number}.")
    reference = stored_model(FOLDER / "hf")
    weights = below(stored, "policy.model.transformer.")
    weights = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    policy = replace(reference, weights=weights)
    algorithm = AlgorithmSettings(
        mc_samples=options["mc_samples"],
        group_size=options["num_generations"],
        proposal=options["is_"],
        uniform_mix=0.0,
        enumerate_short=False,
        live_steps="text",
        clip_low=options["epsilon"],
        clip_high=options["epsilon"],
        kl_coefficient=options["beta"],
    )
    trajectory = stored_trajectory(stored, options)
    gains = stored["advantages"].double()
    draws = draws_at(trajectory, stored["u"].double(), DrawContext(algorithm, EOS, 0))
    batches = batches_of(
        Rollout(trajectory, gains, gains > 0, gains),
        rows_at(trajectory, draws),
        mask_id=MASK,
        token_budget=token_budget,
    )
    loss = 0.0
    for batch in with_reference(batches, reference, options["temperature"]):
        logits = policy_logits(
            policy.score(batch.rows), policy.vocab, temperature=options["temperature"]
        )
        logprobs, _ = token_logprobs(
            logits, batch.targets, vocab=policy.vocab, support_ids=batch.support_ids
        )
        loss = loss + losses.policy(losses.of_tokens(logprobs, batch), algorithm).loss / len(gains)
    assert float(loss.detach()) == pytest.approx(float(stored["loss"]), abs=1e-5)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for name, gradient in zip(weights, gradients, strict=True):
        expected = stored[f"grad.model.transformer.{name}"]
        error = float((gradient - expected).norm() / expected.norm())
        assert error < 1e-4, name
