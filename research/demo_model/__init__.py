"""Makes the demo model: base model, adapters, and the variants of the ablations."""
