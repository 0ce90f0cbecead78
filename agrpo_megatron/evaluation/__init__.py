"""Accuracy of a model: within a run, and over a grid of lengths and denoising steps."""
