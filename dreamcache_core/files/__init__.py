"""Files that are whole or absent, and tensors in safetensors with a checksum."""
