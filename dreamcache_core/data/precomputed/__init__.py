"""Training sets that VAE and text encoders have run over before."""
