"""A small diffusion model of Stable Diffusion's structure, trained on a drawn world, to see and to measure the method."""
