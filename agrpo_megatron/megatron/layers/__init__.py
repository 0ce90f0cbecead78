"""Layer specs on packed rows: of torch alone, and of Transformer Engine."""
