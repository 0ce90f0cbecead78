"""Memory that only a part of an iteration needs."""
