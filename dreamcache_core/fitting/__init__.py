"""Adapters from a model itself, without training."""
