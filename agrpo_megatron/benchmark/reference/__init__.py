"""AGRPO's published rollout and update in plain torch, written from their description."""
