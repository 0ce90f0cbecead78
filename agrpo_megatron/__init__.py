"""Reinforcement learning for masked diffusion language models on Megatron-Core."""

__version__ = "0.1.0"
