"""Fault tolerance: failures that end all ranks, hangs, preemption and restarts."""
