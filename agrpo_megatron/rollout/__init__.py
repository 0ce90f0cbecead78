"""Completions: sampled, graded, and cached until a checkpoint includes their updates."""
