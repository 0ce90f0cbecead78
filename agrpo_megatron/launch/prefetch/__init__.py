"""Fetch what a settings file names from a hub, so that the run needs no network."""
