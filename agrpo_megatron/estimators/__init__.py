"""Policy-gradient estimators for masked diffusion models, in two tables open to others.

`table.ESTIMATORS` turns a rollout into the states, targets and weights that are scored
(`ScoredRows`); `losses.LOSSES` turns scored log-probs into a loss (`LossInputs`, `LossOutputs`).
An estimator draws with counted noise, so all ranks compute the same rows. Pure functions of
tensors: no Megatron and no globals.
"""
