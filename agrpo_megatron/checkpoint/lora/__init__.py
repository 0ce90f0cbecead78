"""Checkpoints of adapters: their base, and their merged weights."""
