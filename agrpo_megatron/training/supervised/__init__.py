"""The examples of the supervised phase: what an iteration learns from, and the held-out loss."""
