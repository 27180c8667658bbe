"""Generating with diffusers: the pipeline, what it is made of, and local model files."""
