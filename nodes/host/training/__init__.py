"""One training run inside ComfyUI."""
