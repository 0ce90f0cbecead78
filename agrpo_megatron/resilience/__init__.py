"""A run that goes on: failures that end all ranks, hangs, preemption, attempts, injected faults."""
