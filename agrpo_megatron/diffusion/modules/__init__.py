"""Any torch module that maps ids to logits, as the network of the sampler and of updates."""
