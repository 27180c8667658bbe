"""For all tests that run in this interpreter."""

import pytest
import torch

from dreamcache_core.fitting import fit

# the models are tiny: more threads cost more than they bring, and starve whatever runs beside
torch.set_num_threads(1)

FEW_PASSES = {"NUM_LATENTS": 2, "NUM_STEPS": 3, "NUM_LOOKS": 2, "NUM_PASSES": 10}
"""As good for a model of random weights."""


@pytest.fixture(autouse=True)
def few_passes(request, monkeypatch):
    """Fit in few passes where nothing is compared with numbers of a whole fit."""
    if request.path.parent.name in ("cli", "data", "fitting", "pipeline", "training"):
        for name, number in FEW_PASSES.items():
            monkeypatch.setattr(fit, name, number)
