"""The reference is the published computation: numbers of the public code, and torch's own count."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agrpo_megatron.benchmark.reference import work
from agrpo_megatron.benchmark.reference.model import Reference, logits_of
from agrpo_megatron.benchmark.reference.rollout import Rollouts, fresh_noise, rollout
from agrpo_megatron.benchmark.reference.update import accumulate, drawn_passes, passes_at
from agrpo_megatron.config.settings import AlgorithmSettings, ModelSettings, SamplingSettings
from agrpo_megatron.families import hf_shapes, settings_from_hf
from agrpo_megatron.families.random_weights import RandomWeights
from tests.devices import DEVICE, Elsewhere, OtherDevice

FOLDER = Path(__file__).parents[1] / "fixtures" / "llada_tiny"
PUBLISHED = SamplingSettings(
    completion_length=32,
    block_length=8,
    denoising_steps=16,
    temperature=0.6,
    top_k=50,
    top_p=0.99,
    forbid_mask_token=False,
)
MODEL = ModelSettings(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=6,
    vocab_size=90,
    mask_token_id=89,
    eos_token_id=88,
)
SMALL = SamplingSettings(completion_length=16, block_length=8, denoising_steps=8, top_k=9)


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "golden.safetensors")


def random_reference(model=MODEL, *, std=0.3):
    """Return a reference with random weights that take a gradient."""
    drawn = RandomWeights(replace(model, init_std=std), seed=0)
    weights = {name: drawn.part(name).requires_grad_() for name in hf_shapes(model)}
    return Reference(model, weights)


def test_logits_are_those_of_the_public_code(golden):
    model = settings_from_hf(FOLDER / "hf")
    reference = Reference(model, load_file(FOLDER / "hf" / "model.safetensors"))
    logits = logits_of(reference, golden["logits.input_ids"])
    assert (logits - golden["logits.logits"]).abs().max() < 1e-5


def test_the_gradient_of_an_update_is_that_of_the_public_code(golden):
    """Steps by their entropies at its uniform numbers, one row ended early; ratios are not 1."""
    own = {name: value for name, value in golden.items() if name.startswith("agrpo.1.")}
    own = {name.removeprefix("agrpo.1."): value for name, value in own.items()}
    names = [name.removeprefix("grad.") for name in own if name.startswith("grad.")]
    weights = {name: own[f"policy.{name}"].requires_grad_() for name in names}
    model = settings_from_hf(FOLDER / "hf")
    assert model.eos_token_id is not None
    rollouts = Rollouts(
        prompts=own["prompt_ids"],
        tokens=own["completion_ids"],
        unmask_step=own["unmask_steps"],
        num_steps=own["unmask_steps"].amax(1) + 1,
        logprobs=own["old_logprobs"],
        entropies=own["old_entropies"],
        support=own["sampling_masks"],
    )
    passes = passes_at(rollouts, own["u"], eos_id=model.eos_token_id)
    reference, algorithm = Reference(model, weights), AlgorithmSettings()
    accumulate(reference, rollouts, own["advantages"], passes, PUBLISHED, algorithm)
    for name in names:
        wanted, grad = own[f"grad.{name}"], weights[name].grad
        assert grad is not None
        assert (grad - wanted).norm() < 1e-4 * wanted.norm(), name


def counted(function):
    """Return the result of a function, and the FLOPs that torch counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


def test_every_flop_of_the_reference_is_counted():
    """In the rollout and in the update, with fewer key heads than query heads."""
    reference = random_reference()
    prompts = torch.arange(15).view(3, 5)
    noise = fresh_noise(90, prompts.device)
    found, flops = counted(lambda: rollout(reference, prompts, SMALL, noise))
    ours = work.rollout_work(MODEL, found)
    assert ours.flops == flops
    assert (ours.forwards, ours.token_forwards) == (8, 8 * 3 * 21)
    assert found.support.shape == (3, 16, 90) and (found.support.sum(2) == 9).all()
    passes = drawn_passes(found, 4, eos_id=88)
    gains = torch.tensor([1.0, 0.0, -1.0])
    _, flops = counted(
        lambda: accumulate(reference, found, gains, passes, SMALL, AlgorithmSettings())
    )
    ours = work.update_work(MODEL, found, passes=4)
    assert ours.flops == flops
    assert (ours.forwards, ours.scored_rows) == (4, 4 * 3 * 21)


def test_a_row_leaves_after_a_block_of_ends_of_text():
    """Of six ids, the end of text is by far the likeliest: rows end, each at a block of its own."""
    model = replace(MODEL, vocab_size=6, mask_token_id=5, eos_token_id=4)
    reference = random_reference(model, std=0.02)
    weights = {name: weight.detach() for name, weight in reference.weights.items()}
    sampling = SamplingSettings(completion_length=12, block_length=1, denoising_steps=12)
    prompts = torch.arange(8)[:, None] % 4
    torch.manual_seed(0)
    noise = fresh_noise(6, prompts.device)
    found = rollout(Reference(model, weights), prompts, sampling, noise)
    is_end, steps = found.tokens == 4, found.num_steps.tolist()
    assert found.rows == sum(steps) and len(set(steps)) > 2
    for row, count in enumerate(steps):
        assert not is_end[row, : count - 1].any()
        assert is_end[row, count:].all() and (found.unmask_step[row, count:] == count).all()


def test_nothing_of_the_reference_mixes_devices():
    """Weights and prompts are on another device; all that is made of them is there, too."""
    reference = random_reference()
    weights = {
        name: Elsewhere(w.detach()).requires_grad_() for name, w in reference.weights.items()
    }
    moved, prompts = Reference(MODEL, weights), Elsewhere(torch.arange(15).view(3, 5))
    sampling = replace(SMALL, top_p=0.8, temperature=0.7)
    with OtherDevice():
        found = rollout(moved, prompts, sampling, fresh_noise(90, DEVICE))
        passes = drawn_passes(found, 2, eos_id=88)
        gains = Elsewhere(torch.tensor([1.0, 0.0, -1.0]))
        accumulate(moved, found, gains, passes, sampling, AlgorithmSettings())
    assert all(weight.grad is not None for weight in weights.values())
