"""Open a checkpoint, sample batches from it, and compare estimators and numbers of draws."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agrpo_megatron.checkpoint.start import load_model
from agrpo_megatron.config.rules.algorithm import OF_ESTIMATORS, validate_algorithm
from agrpo_megatron.config.rules.cached import validate_cached
from agrpo_megatron.config.rules.rollouts import CORRECTION
from agrpo_megatron.config.settings import AlgorithmSettings, Settings
from agrpo_megatron.config.settings.estimators import ENTRIES
from agrpo_megatron.megatron.engine import Engine, build_engine, build_reference
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import start_ranks, stop_ranks
from agrpo_megatron.rollout.replay import open_replay
from agrpo_megatron.rollout.session import Output, Run, Session
from agrpo_megatron.runs.log import RunLog
from agrpo_megatron.runs.resolve import Resolved
from agrpo_megatron.tasks.grading import Grader
from agrpo_megatron.training.rl import collect_rollout
from agrpo_megatron.training.variance.measure import Comparison, compare, gradients_of

FULL = "full_trajectory"


@dataclass(frozen=True)
class Plan:
    """What is compared: batches of an iteration's size, and draws of each estimator."""

    variants: dict[str, AlgorithmSettings]  # by label; the full trajectory is one of them
    batches: int
    draws: int
    first: int  # iteration of the first batch


def plan_variants(
    settings: Settings, draws: Sequence[int], estimators: Sequence[str]
) -> dict[str, AlgorithmSettings]:
    """Return the run's estimator with each number of draws, the full trajectory, and others.

    Raises:
        ValueError: no such estimator, or one that cannot score this sampler's rollouts.
    """
    groups = settings.algorithm.prompts_per_iteration
    if groups % 2:
        raise ValueError(
            f"algorithm.prompts_per_iteration={groups} cannot be halved, and noise is measured "
            f"between the halves of a batch; use {groups + 1}"
        )
    shared = ("prompts_per_iteration", "group_size", "baseline", "scale_by_std")
    of_steps = ("scoring", "rollout_experts", CORRECTION)
    every = (*shared, *of_steps)
    common: dict[str, Any] = {name: getattr(settings.algorithm, name) for name in every}
    own = settings.algorithm
    drawn = own if own.name == "agrpo" else AlgorithmSettings(**common)
    share = AlgorithmSettings().auto_share  # of auto, which a number replaces
    variants = {f"agrpo, k {k}": replace(drawn, mc_samples=k, auto_share=share) for k in draws}
    for name in dict.fromkeys([FULL, *estimators]):
        if name not in ENTRIES:
            raise ValueError(f"--estimators={name}: use any of {', '.join(ENTRIES)}")
        # A pair of completions has no advantage to subtract a baseline from.
        kept = ("group_size",) if name == "vrpo" else shared
        kept += tuple(key for key in of_steps if name in OF_ESTIMATORS[key])
        variants[name] = AlgorithmSettings(name=name, **{key: common[key] for key in kept})
    for algorithm in variants.values():
        validate_algorithm(algorithm, settings.sampling)
        validate_cached(replace(settings, algorithm=algorithm))
    return variants


@contextmanager
def opened(
    resolved: Resolved, checkpoint: Path | None, *, needs_reference: bool = False
) -> Iterator[tuple[Session, Engine, Network | None]]:
    """Open a checkpoint for gradients that no update takes; called by every rank.

    Yields a session, an engine with the weights, and the reference if it is needed.

    Args:
        checkpoint: of a run; None takes the weights that `model.load` names.
    """
    settings = resolved.settings
    # Weights never change, so the optimizer needs neither shards nor smaller states.
    plain = replace(
        settings.optimizer, distributed=False, moments="fp32", main_gradients="fp32", offload=0.0
    )
    ranks = start_ranks(settings)
    try:
        log = RunLog(Path(settings.run.dir), settings=settings, is_main=False)
        engine = build_engine(settings, plain, iterations=1, ranks=ranks)
        reference = build_reference(settings, engine.network) if needs_reference else None
        for network in (engine.network, *([reference] if reference else [])):
            if not network.is_reference:
                load_model(network, settings, checkpoint)
        engine.init_main_weights({})
        with closing(Grader(resolved.task, settings.task)) as grader:
            replay = open_replay(settings)
            run = Run(settings, ranks, resolved.task, resolved.tokenizer, grader, replay)
            yield Session(run, Output(log)), engine, reference
    finally:
        stop_ranks()


def measure(
    resolved: Resolved, checkpoint: Path | None, plan: Plan, *, show: Callable[[str], None]
) -> Comparison:
    """Sample batches from a checkpoint and measure every variant; called by every rank.

    Args:
        checkpoint: of a run; None takes the weights that `model.load` names.
        show: called with a line for each step of the work.
    """
    needs_reference = any(algorithm.needs_reference for algorithm in plan.variants.values())
    with opened(resolved, checkpoint, needs_reference=needs_reference) as (session, engine, frozen):
        rollouts, work = [], 0.0
        for number in range(plan.batches):
            show(f"sampling batch {number + 1} of {plan.batches}")
            rollout, metrics = collect_rollout(session, engine, plan.first + number)
            rollouts.append(rollout)
            work += metrics["tokens"] / plan.batches
        if not any(bool((rollout.advantages != 0).any()) for rollout in rollouts):
            raise ValueError(
                "no completion of these batches has an advantage: the rewards of each group "
                "are equal, and so all gradients are zero; use more --batches, a higher "
                "algorithm.group_size, or another checkpoint"
            )
        found = {}
        for label, algorithm in plan.variants.items():
            show(f"gradients of {label}")
            draws = 1 if label == FULL else plan.draws
            found[label] = gradients_of(
                session, engine, rollouts, algorithm, reference=frozen, draws=draws
            )
    return compare(found, found[FULL], rollout_work=work)


def recommended(comparison: Comparison) -> str:
    """Return the label of the draws with the most signal for the work."""
    qualities = comparison.qualities.items()
    of_draws = {n: q for n, q in qualities if n == FULL or n.startswith("agrpo, k")}
    return max(of_draws, key=lambda label: of_draws[label].per_work)
