"""How often a denoising step makes the host wait for the GPU; counted without one."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from agrpo_megatron.diffusion import packing
from agrpo_megatron.diffusion.packing import on_device
from agrpo_megatron.diffusion.sampler import SamplerHooks
from agrpo_megatron.rollout.generate import sample_prompts
from agrpo_megatron.rollout.requests import encode_prompts
from agrpo_megatron.tasks.base import task_prompts
from tests.devices import DEVICE, Elsewhere, move
from tests.ranks import run_ranks
from tests.training.tiny import open_session
from tests.waits import Waits

ROWS = 6
MOST = 6  # waits of any denoising step
BASE = 2  # how many tokens are scored, and which rows are over

EARLY_END = ["sampling.early_end=true", "model.eos_token_id=39", "sampling.block_length=1"]
# With top-p, the host also waits to know the widest support: after each search for candidates.
SAMPLERS = {
    "random": ([], BASE),
    "low confidence": (["sampling.unmasking=low_confidence"], BASE),
    "entropy": (["sampling.unmasking=entropy"], BASE),
    "margin": (["sampling.unmasking=margin"], BASE),
    "margin, top-k": (["sampling.unmasking=margin", "sampling.top_k=9"], BASE),
    "early end": ([*EARLY_END, "sampling.denoising_steps=8"], BASE),
    "threshold": (["sampling.unmasking=low_confidence", "sampling.threshold=0.12"], BASE),
    "random, threshold": (["sampling.threshold=0.12"], BASE),
    "leftmost": (["sampling.unmasking=leftmost"], BASE),
    "leftmost, threshold": (["sampling.unmasking=leftmost", "sampling.threshold=0.12"], BASE),
    "untempered": (["sampling.temperature=0.7", "sampling.confidence=untempered"], BASE),
    "top-k": (["sampling.top_k=9"], BASE),
    "top-k and top-p": (["sampling.top_k=9", "sampling.top_p=0.9"], BASE + 1),
    "top-p": (["sampling.top_p=0.9"], BASE + 2),
    "top-p first": (
        ["sampling.top_k=9", "sampling.top_p=0.9", "sampling.truncation=top_p_first"],
        BASE + 1,
    ),
    "shift": (["model.shift=true"], BASE),
    "shift, low confidence": (["model.shift=true", "sampling.unmasking=low_confidence"], BASE),
    "dream": (
        [
            "sampling.schedule=dream",
            "sampling.block_length=8",
            "sampling.unmasking=bernoulli",
            "model.shift=true",
        ],
        BASE,
    ),
    "all of it": (
        [
            *EARLY_END,
            "sampling.denoising_steps=8",
            "sampling.unmasking=low_confidence",
            "sampling.threshold=0.12",
            "sampling.top_k=20",
            "sampling.top_p=0.9",
            "sampling.temperature=0.7",
            "sampling.confidence=untempered",
            "model.shift=true",
        ],
        BASE + 1,
    ),
}


def _count_all():
    return {name: _count(overrides) for name, (overrides, _) in SAMPLERS.items()}


def _count(overrides):
    """Return what the host waited for in each turn: a denoising step of all rows."""
    session, engine = open_session("train.token_budget=1000", *overrides)
    run, network = session.run, engine.rollout_network()
    problems = [run.task.problems("train")[row] for row in range(ROWS)]
    prompts = encode_prompts(run, task_prompts(run.task, problems, split="train"))
    ranks = replace(run.ranks, device=DEVICE)
    for chunk in network.chunks:
        move(chunk)
        chunk.ranks = ranks
    there, ids = [Elsewhere(prompt) for prompt in prompts], Elsewhere(torch.arange(ROWS))
    network, turns = replace(network, ranks=ranks), []
    with Waits() as waits:

        def note():
            turns.append(len(waits.seen))
            return False

        hooks = SamplerHooks(should_stop=note)
        trajectory, _ = sample_prompts(
            run, network, there, ids, sampling=run.settings.sampling, hooks=hooks
        )
    assert isinstance(trajectory.tokens, Elsewhere)
    steps = [waits.seen[start:end] for start, end in zip(turns, turns[1:], strict=False)]
    return steps[1:], int(trajectory.num_steps.inner.max())  # the first turn only starts


@cache
def counts():
    return run_ranks(1, _count_all)[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoising_step_waits_a_few_times(name):
    steps, ran = counts()[name]
    assert len(steps) >= ran - 2 and ran >= 3
    most = max(steps, key=len)
    assert len(most) <= MOST, most
    assert len(most) <= SAMPLERS[name][1], most


def values() -> torch.Tensor:
    return torch.arange(4, device=DEVICE)


# What a caller does, and how often the host waits for it.
COUNTED = {
    "item": (lambda x: x[0].item(), 1),
    "bool": (lambda x: bool((x > 2).all()), 1),
    "int": (lambda x: int(x.max()), 1),
    "tensor as a row's number": (lambda x: x[x[0]], 1),
    "tolist": (lambda x: x.tolist(), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "to the host, whatever is asked": (lambda x: x.to("cpu", non_blocking=True), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "nonzero as tuple": (lambda x: x.nonzero(as_tuple=True), 1),
    "mask as index": (lambda x: x[x > 1], 1),
    "two masks": (lambda x: (x[x > 1], x[x > 2]), 2),
    "write through a mask": (lambda x: x.__setitem__(x > 1, x[:2] + 1), 1),
    "masked_select": (lambda x: x.masked_select(x > 1), 1),
    "unique": (lambda x: x.unique(), 1),
    "isin": (lambda x: torch.isin(x, x), 1),
    "equal": (lambda x: torch.equal(x, x), 1),
    "repeat_interleave": (lambda x: x.repeat_interleave(x), 1),
    "tensor of numbers": (lambda x: torch.tensor([1, 2], device=DEVICE), 1),
    "new_tensor": (lambda x: x.new_tensor([1]), 1),
    "to the device": (lambda x: torch.arange(3).to(DEVICE), 1),
    "copy_ to the device": (lambda x: x.copy_(torch.arange(4)), 1),
    "list as index": (lambda x: x[[1, 2]], 1),
    "write through a list": (lambda x: x.__setitem__([1, 2], x[:2] + 1), 1),
    "host tensor as index": (lambda x: x[torch.arange(2)], 1),
    "host copy without waiting": (lambda x: on_device([1, 2], DEVICE), 0),
    "arithmetic": (lambda x: (x + 1).cumsum(0).sort().values.max(), 0),
    "index": (lambda x: x[x], 0),
    "write through an index": (lambda x: x.__setitem__(x + 0, x + 1), 0),
    "masked_fill": (lambda x: x.masked_fill(x > 1, 0), 0),
    "where": (lambda x: torch.where(x > 1, x, 0), 0),
    "repeat_interleave of known size": (lambda x: x.repeat_interleave(x, output_size=6), 0),
    "made there": (lambda x: torch.zeros(3, device=DEVICE), 0),
    "on the host": (lambda x: torch.arange(3)[torch.arange(3) > 1].tolist(), 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_counter_counts(name):
    use, expected = COUNTED[name]
    with Waits() as waits:
        made = values()
        before = len(waits.seen)
        use(made)
    assert len(waits.seen) - before == expected, waits.seen


def test_numbers_are_copied_to_a_gpu_from_pinned_memory_without_blocking(monkeypatch):
    """Without a GPU torch cannot pin: the two calls are noted in its place."""
    calls = {}

    class Made:
        def to(self, device, **options):
            calls["to"] = (device, options)

    def tensor(numbers, **options):
        calls["tensor"] = (numbers, options)
        return Made()

    monkeypatch.setattr(packing.torch, "tensor", tensor)
    device = torch.device("cuda", 1)
    on_device([3, 4], device, dtype=torch.int32)
    assert calls["tensor"] == ([3, 4], {"dtype": torch.int32, "pin_memory": True})
    assert calls["to"] == (device, {"non_blocking": True})
