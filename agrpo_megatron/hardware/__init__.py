"""What a machine offers, and which kernels a run uses on it."""
