"""Policy-gradient estimators for masked diffusion models, in two tables open to others.

`table.ESTIMATORS` turns a rollout into the states, targets and weights that are scored
(`ScoredRows`); `losses.LOSSES` turns scored log-probs into a loss (`LossInputs`, `LossOutputs`).
An estimator draws with counted noise, so all ranks compute the same rows. Pure functions of
tensors: no Megatron and no globals. The names below are for programs of your own: docs/library.md.
"""

from agrpo_megatron.config.settings import AlgorithmSettings
from agrpo_megatron.estimators.context import DrawContext
from agrpo_megatron.estimators.losses import LOSSES
from agrpo_megatron.estimators.objective import make_loss
from agrpo_megatron.estimators.scoring import score_tokens
from agrpo_megatron.estimators.steps import all_steps, drawn_steps, rows_at
from agrpo_megatron.estimators.table import ESTIMATORS, scored_rows
from agrpo_megatron.estimators.update import make_rollout, micro_batches, update_losses
from agrpo_megatron.types import Rollout, ScoredRows

__all__ = [
    "ESTIMATORS",
    "LOSSES",
    "AlgorithmSettings",
    "DrawContext",
    "Rollout",
    "ScoredRows",
    "all_steps",
    "drawn_steps",
    "make_loss",
    "make_rollout",
    "micro_batches",
    "rows_at",
    "score_tokens",
    "scored_rows",
    "update_losses",
]
