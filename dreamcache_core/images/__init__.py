"""Images: files, tensors, and the reference image that the method asks for."""
