"""Models of another kind to start from: autoregressive ones."""
