"""Low-rank adapters at every layout."""
