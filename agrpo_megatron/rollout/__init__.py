"""Completions of problems: sampled, graded and kept until a checkpoint has learned from them."""
