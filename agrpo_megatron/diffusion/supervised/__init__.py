"""Masked examples of the supervised phase as packed rows."""
