"""What the adapters are trained for: to predict the noise (or v) in the target. Knows tensors only.

Source: METHOD.md section 7.
"""

from torch import Tensor

MIN_TIMESTEP = 400
"""Targets get this much noise at least: what has less tells little of the subject (docs/training.md); METHOD.md's is 0."""


def denoising_loss(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean squared error of each row, weighted, averaged over the batch; in float32.

    Args:
        prediction: Output of the U-Net, (batch, channels, height, width), any float dtype.
        target: From ``NoiseSchedule.target``, same shape.
        weights: From ``NoiseSchedule.weights``, (batch,).

    Returns:
        A scalar.
    """
    errors = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return (errors * weights).mean()
