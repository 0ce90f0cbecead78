"""A run on disk: its settings, its directory and its log."""
