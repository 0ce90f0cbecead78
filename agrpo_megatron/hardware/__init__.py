"""What a machine offers, and which kernels a run takes on it."""
