"""Sharded checkpoints of a run, in Megatron's own format."""
