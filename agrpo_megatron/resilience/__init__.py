"""Fault tolerance: failures that end all ranks, hangs, preemption, restarts, injected faults."""

FAULTS = "AGRPO_FAULTS"  # the environment variable that asks for injected faults
