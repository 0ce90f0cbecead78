"""The files of our own with which transformers loads an exported model."""
