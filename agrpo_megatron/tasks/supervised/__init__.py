"""Supervised data: rows of a user's files as conversations, and their order in training."""
