"""Rows in which partially masked states of a rollout share a context."""
