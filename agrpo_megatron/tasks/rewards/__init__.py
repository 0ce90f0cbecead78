"""Rewards and parsers by their published names, and their comparisons of answers."""
