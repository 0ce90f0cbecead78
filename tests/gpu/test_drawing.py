"""Drawing tokens: the kernel against tensor operations, and how often a step waits for the GPU."""

import warnings

import pytest
import torch

from agrpo_megatron.config.settings import SamplingSettings
from agrpo_megatron.diffusion import draw as drawing
from agrpo_megatron.diffusion import noise
from agrpo_megatron.diffusion.draw import draw_tokens
from agrpo_megatron.diffusion.logprobs import Vocabulary
from tests.gpu.common import REHEARSES, engine_of, local
from tests.gpu.rollouts import sampled

pytestmark = pytest.mark.gpu

COLUMNS = 1024 if REHEARSES else 126_464
VOCAB = Vocabulary(COLUMNS - 64, forbidden=(COLUMNS - 100,))
NEAR = 1e-5  # of log-probs and entropies: float32 sums in another order
POLICIES = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "tempered": {"temperature": 0.7, "confidence": "untempered"},
    "margin": {"unmasking": "margin"},
}
WAITS = 6  # most of a denoising step


@pytest.mark.parametrize("policy", POLICIES)
def test_the_kernel_draws_the_tokens_of_tensor_operations(monkeypatch, policy):
    device = torch.device("cpu" if REHEARSES else "cuda")
    logits = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(0)).mul(3)
    logits = logits.to(device, torch.bfloat16)
    keys = noise.noise_key(0, noise.TOKENS, torch.arange(64, device=device))
    sampling = SamplingSettings(**POLICIES[policy])
    assert (drawing.kernel_for(logits) is None) == REHEARSES
    got = draw_tokens(logits, keys, vocab=VOCAB, sampling=sampling)
    monkeypatch.setattr(drawing, "kernel_for", lambda _logits: None)
    expected = draw_tokens(logits, keys, vocab=VOCAB, sampling=sampling)
    assert torch.equal(got.tokens, expected.tokens)
    for name in ("logprobs", "entropies", "spreads", "confidences"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert torch.allclose(ours, theirs, rtol=NEAR, atol=NEAR), name


@pytest.mark.parametrize("unmasking", ["random", "low_confidence"])
def test_a_denoising_step_waits_for_the_gpu_a_few_times(unmasking, record_property):
    if REHEARSES:
        pytest.skip("torch counts waits for a GPU only; see tests/rollout/test_waits.py")
    with engine_of(*local("bf16"), f"sampling.unmasking={unmasking}") as (engine, settings):
        network = engine.rollout_network()
        sampled(network, settings)  # loads kernels
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trajectory = sampled(network, settings)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)
    steps = int(trajectory.num_steps.max())
    record_property("waits of a step", waits / steps)
    assert 0 < waits <= WAITS * steps
