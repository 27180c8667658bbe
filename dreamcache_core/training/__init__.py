"""Training of adapters: the objective, the start values, the loop."""
