"""The `agrpo` command."""
