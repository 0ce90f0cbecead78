"""Rewards and parsers by their published names, and what they compare answers with."""
