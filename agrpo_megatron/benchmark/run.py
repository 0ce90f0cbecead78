"""Run a plan: equality first, then counted work, memory, and interleaved seconds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from agrpo_megatron.benchmark import ours as mine
from agrpo_megatron.benchmark import work
from agrpo_megatron.benchmark.equality import (
    Equality,
    counted_noise,
    own_records,
    same_gradient,
    same_rollouts,
)
from agrpo_megatron.benchmark.measure import Products, interleaved, peak_bytes, seconds_within
from agrpo_megatron.benchmark.ours import Ours, open_ours
from agrpo_megatron.benchmark.plan import Plan
from agrpo_megatron.benchmark.reference import update as published
from agrpo_megatron.benchmark.reference import work as published_work
from agrpo_megatron.benchmark.reference.model import Reference
from agrpo_megatron.benchmark.reference.rollout import fresh_noise, rollout
from agrpo_megatron.benchmark.work import Counted
from agrpo_megatron.megatron.parallel import stop_ranks
from agrpo_megatron.types import Rollout, Trajectory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    run: Callable[[], Any]
    counted: Counted


@dataclass(frozen=True)
class Result:
    """A measured side."""

    counted: Counted
    seconds: list[float]  # of each repeat
    peak_bytes: int  # above weights, gradients and states of the optimizer


@dataclass(frozen=True)
class Body:
    """What the layers of a rollout reach, without embedding, head and drawing."""

    flops_per_second: float
    products: float  # FLOP/s of products in the layers' shapes, those of the attention included

    @property
    def share(self) -> float:
        """Return the share of the products' rate."""
        return self.flops_per_second / self.products


@dataclass(frozen=True)
class Found:
    """What a plan measured."""

    device: torch.device
    ours: Result
    reference: Result | None
    equality: Equality | None
    ceiling: float | None  # FLOP/s of the layers' products; None: not measured
    body: Body | None = None  # of a rollout of ours; None: not measured


def measure(plan: Plan, show: Callable[[str], None]) -> Found:
    """Measure a plan on one rank.

    Args:
        show: called with a line for each step of the work.

    Raises:
        equality.Unequal: the reference computes something else; nothing was timed.
    """
    equality, settings = None, plan.settings
    if plan.has_reference and settings.precision != "fp32":
        show("comparing with the reference in float32")
        equality = _equality(replace(plan, settings=replace(settings, precision="fp32")))
    try:
        found = _measured(plan, open_ours(plan), show)
    finally:
        stop_ranks()
    if equality is None or found.equality is None:
        return found
    return replace(found, equality=replace(equality, bf16_error=found.equality.gradient_error))


def _equality(plan: Plan) -> Equality:
    """Compare rollouts, and gradients if the plan has updates; times nothing."""
    try:
        ours = open_ours(plan)
        trajectory, _ = mine.sample(ours)
        scored = mine.rewarded(ours, trajectory) if plan.kind != "rollout" else None
        return _reference_side(plan, ours, trajectory, scored)[0]
    finally:
        stop_ranks()


def _measured(plan: Plan, ours: Ours, show: Callable[[str], None]) -> Found:
    show("sampling once")
    trajectory, forward = mine.sample(ours)
    counted = work.rollout_work(trajectory, forward, ours.settings)
    scored = mine.rewarded(ours, trajectory) if plan.kind != "rollout" else None
    equality, theirs = None, None
    if plan.has_reference:
        show("comparing with the reference")
        equality, theirs = _reference_side(plan, ours, trajectory, scored)
    sides = {"ours": _our_side(plan, ours, counted, scored)}
    if theirs is not None:
        sides["reference"] = theirs
    show("measuring memory")
    peaks = {name: peak_bytes(side.run, ours.device) for name, side in sides.items()}
    runs = {name: side.run for name, side in sides.items()}
    ceiling = _products(plan, ours, with_attention=False) if plan.has_ceiling else None
    if ceiling is not None:
        runs["ceiling"] = ceiling
    body, within = None, list[float]()
    if ceiling is not None and plan.kind == "rollout":
        body = _products(plan, ours, with_attention=True)
        layers = ours.engine.network.chunks[0].decoder
        run = runs["ours"]
        runs |= {
            "body": lambda: within.append(seconds_within(layers, run, ours.device)),
            "products": body,
        }
    show(f"timing, {plan.repeats} times each")
    spent = interleaved(runs, repeats=plan.repeats, device=ours.device)
    results = {n: Result(side.counted, spent[n], peaks[n]) for n, side in sides.items()}
    rate = None if ceiling is None else ceiling.flops / min(spent["ceiling"])
    reached = None
    if body is not None:
        flops = work.body_flops(counted, ours.settings.model)
        reached = Body(flops / median(within), body.flops / min(spent["products"]))
    return Found(ours.device, results["ours"], results.get("reference"), equality, rate, reached)


def _our_side(plan: Plan, ours: Ours, sampling: Counted, scored: Rollout | None) -> Side:
    """Return what is timed of ours; mutates the weights if it has an update."""
    if scored is None:
        return Side(lambda: mine.sample(ours), sampling)
    updating = work.update_work(mine.prepared(ours, scored)[0])
    if plan.kind == "train-step":
        return Side(lambda: mine.update(ours, scored), updating)

    def iterate() -> None:
        mine.update(ours, mine.rewarded(ours, mine.sample(ours)[0]))

    return Side(iterate, sampling + updating)


def _reference_side(
    plan: Plan, ours: Ours, trajectory: Trajectory, scored: Rollout | None
) -> tuple[Equality, Side]:
    """Check that the reference computes the same; return what is timed of it."""
    settings, model = ours.settings, ours.settings.model
    reference = Reference(model, mine.weights(ours))
    assert model.vocab_size is not None
    noise = fresh_noise(model.vocab_size, ours.device)

    def sample() -> Any:
        return rollout(reference, ours.prompts, settings.sampling, noise)

    found = rollout(reference, ours.prompts, settings.sampling, counted_noise(ours))
    sampling = published_work.rollout_work(model, found)
    # In bfloat16, tokens that are nearly as likely change places, and all later states with them.
    is_exact = settings.precision == "fp32"
    equality = same_rollouts(trajectory, found) if is_exact else Equality(0, 0.0)
    if scored is None:
        return equality, Side(sample, sampling)
    for weight in reference.weights.values():
        weight.requires_grad_()
    own = own_records(trajectory, ours.prompts, vocab=model.vocab_size)
    equality = replace(equality, gradient_error=same_gradient(ours, scored, reference, own))
    optimizer = published.make_optimizer(reference, settings.optimizer)
    draws, gains = settings.algorithm.draws, scored.advantages

    def update(rollouts: Any) -> None:
        passes = published.drawn_passes(rollouts, draws, eos_id=model.eos_token_id)
        published.accumulate(
            reference, rollouts, gains, passes, settings.sampling, settings.algorithm
        )
        published.step(reference, optimizer, settings.optimizer)

    updating = published_work.update_work(model, found, passes=draws)
    if plan.kind == "train-step":
        return equality, Side(lambda: update(own), updating)
    return equality, Side(lambda: update(sample()), sampling + updating)


def _products(plan: Plan, ours: Ours, *, with_attention: bool) -> Products:
    return Products(
        plan.settings.model,
        rows=plan.batch,
        length=plan.row_length,
        dtype=DTYPES[plan.settings.precision],
        device=ours.device,
        with_attention=with_attention,
    )
