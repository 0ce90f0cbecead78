"""Everything that touches Megatron-Core: platform, ranks, layer spec, model, optimizer."""
