"""Checkpoints of adapters: their base, their merged weights, and PEFT's format."""
