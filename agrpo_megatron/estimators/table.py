"""Every estimator by its `algorithm.name`; docs/estimators.md compares them."""

from collections.abc import Callable
from dataclasses import replace

from agrpo_megatron.config.own_code import find_function, is_file_name
from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.config.settings.estimators import ON_MASKS
from agrpo_megatron.estimators import steps, trajectory
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.family import family
from agrpo_megatron.estimators.losses import LOSSES, OF_TOKENS, Loss, plain_metrics
from agrpo_megatron.estimators.weights import needs_every_rollout, select_rows
from agrpo_megatron.types import LossInputs, LossOutputs, Rollout, ScoredRows

type Estimator = Callable[[Rollout, DrawContext], ScoredRows]

ESTIMATORS: dict[str, Estimator] = {
    "agrpo": steps.agrpo,
    "full_trajectory": steps.full_trajectory,
    "just_grpo": trajectory.just_grpo,
    "block_just_grpo": trajectory.block_just_grpo,
    "cj_grpo": trajectory.cj_grpo,
    "step_merge": trajectory.step_merge,
    "tracerl": trajectory.tracerl,
    "egspo": trajectory.egspo,
    "rldf": trajectory.rldf,
    **dict.fromkeys(ON_MASKS, family),
}


def find_estimator(algorithm: AlgorithmSettings) -> Estimator:
    """Return the estimator of `algorithm.name`: an entry, or the user's `FILE.py:FUNCTION`.

    Raises:
        ValueError: the file or the function does not exist.
    """
    if is_file_name(algorithm.name):
        return find_function(algorithm.name, said=f"algorithm.name={algorithm.name}")
    return ESTIMATORS[algorithm.name]


def find_loss(algorithm: AlgorithmSettings) -> Loss:
    """Return the loss of `algorithm.loss`: an entry, or the user's `FILE.py:FUNCTION`.

    Raises:
        ValueError: the file or the function does not exist.
    """
    name = algorithm.filled.loss
    assert name is not None
    if is_file_name(name):
        return _with_metrics(find_function(name, said=f"algorithm.loss={name}"))
    return LOSSES[name]


def _with_metrics(loss: Loss) -> Loss:
    """Add the metrics of ratios to a loss of the user, and log its own as `loss/NAME`."""

    def with_metrics(inputs: LossInputs, algorithm: AlgorithmSettings) -> LossOutputs:
        outputs = loss(inputs, algorithm)
        own = {f"loss/{name}": metric for name, metric in outputs.metrics.items()}
        return replace(outputs, metrics=plain_metrics(inputs) | own)

    return with_metrics


def scored_rows(rollout: Rollout, context: DrawContext) -> ScoredRows:
    """Return the rows of the estimator that have a gradient."""
    settings = context.algorithm.filled
    rows = find_estimator(settings)(rollout, context)
    if settings.scored_policy == "model":
        rows = replace(rows, is_sampled=False)
    return useful_rows(rows, rollout, settings)


def useful_rows(rows: ScoredRows, rollout: Rollout, algorithm: AlgorithmSettings) -> ScoredRows:
    """Drop rows without advantage where a loss, a KL or a bonus has no gradient there."""
    if needs_every_rollout(algorithm):
        return rows
    gains = rollout.advantages[rows.rollout] if rows.advantage is None else rows.advantage
    return select_rows(rows, (gains != 0).nonzero()[:, 0])


def is_joint(rows: ScoredRows, algorithm: AlgorithmSettings) -> bool:
    """Return whether the loss needs all tokens of an update at once."""
    has_units = rows.unit is not None or rows.turns is not None
    return has_units or algorithm.filled.loss not in OF_TOKENS


def needs_old_pass(
    rows: ScoredRows, algorithm: AlgorithmSettings, *, is_recorded: bool, is_first: bool
) -> bool:
    """Return whether an update first scores its rows, without gradient, as they were sampled.

    The first update of a loss of single tokens needs no pass: its old policy is the current one.

    Args:
        is_recorded: the rollout has the log-probs of the targets.
        is_first: the weights are still those that sampled.
    """
    if is_recorded:
        return algorithm.rollout_correction is not None
    return not is_first or is_joint(rows, algorithm)


def needs_current_pass(rows: ScoredRows, algorithm: AlgorithmSettings, *, is_first: bool) -> bool:
    """Return whether a joint loss needs a pass under the present weights before its gradient."""
    return is_joint(rows, algorithm) and not (is_first and not rows.is_sampled)
