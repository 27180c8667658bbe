"""One call of the U-Net with references in it."""
