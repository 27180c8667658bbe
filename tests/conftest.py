"""For all tests that run in this interpreter."""

import torch

# the models are tiny: more threads cost more than they bring, and starve whatever runs beside
torch.set_num_threads(1)
