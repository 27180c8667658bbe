"""Training data: readers, augmentation, synthetic sets, precomputed latents."""
