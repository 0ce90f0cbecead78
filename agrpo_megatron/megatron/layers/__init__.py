"""Layer specs on packed rows: torch (`local`), Transformer Engine (`te`)."""
