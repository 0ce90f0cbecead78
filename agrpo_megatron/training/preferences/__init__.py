"""Preference pairs in the supervised phase: masks, loss, updates and held-out pairs."""
