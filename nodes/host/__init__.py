"""What talks to ComfyUI: its model patches, samplers, folders and progress."""
