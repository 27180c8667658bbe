"""What is measured inside ComfyUI, by its own interpreter; imports nothing that ComfyUI lacks."""
