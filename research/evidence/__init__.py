"""Measures the demo model on held-out subjects, and replays the ablations of the paper."""
