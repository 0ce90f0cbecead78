"""Measure the noise and the bias of estimators on rollouts of a checkpoint."""
