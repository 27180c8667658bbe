"""Noise levels of a base model and what it predicts. Knows tensors only. Source: METHOD.md section 7."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

PREDICTIONS = ("epsilon", "v_prediction")
NUM_TIMESTEPS = 1000


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Noise levels of the base model and what it predicts.

    Attributes:
        alphas_cumprod: abar_t for t = 0 ... 999, (1000,), in [0, 1].
        prediction: ``epsilon`` or ``v_prediction``.
    """

    alphas_cumprod: Tensor
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        """Check what the base model predicts.

        Raises:
            InputError: It is neither noise nor v.
        """
        if self.prediction not in PREDICTIONS:
            raise InputError(
                f"Adapters are trained on models that predict {' or '.join(PREDICTIONS)}; this one predicts "
                f"{self.prediction!r}. Use a Stable Diffusion 1.x, 2.x or SDXL base model."
            )

    def add_noise(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise a latent: ``x_t = sqrt(abar_t) * z + sqrt(1 - abar_t) * noise`` (METHOD.md section 3, point 3).

        Args:
            latent: Scaled latent, (batch, channels, height, width).
            noise: Unit noise, same shape.
            timesteps: Training index of each row, int64 (batch,).

        Returns:
            Same shape and dtype as ``latent``.
        """
        signal, sigma = self._signal_and_noise(timesteps, latent)
        return signal * latent + sigma * noise

    def target(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict: the noise, or ``v = sqrt(abar_t) * noise - sqrt(1 - abar_t) * z``; see ``add_noise``."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._signal_and_noise(timesteps, latent)
        return signal * noise - sigma * latent

    def split(self, noised: Tensor, prediction: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Take a noised latent apart as a prediction says; the inverse of ``add_noise``.

        Args:
            noised: (batch, channels, height, width).
            prediction: Of the noise or v, same shape.
            timesteps: Training index of each row, int64 (batch,).

        Returns:
            Latent and unit noise, same shape.
        """
        signal, sigma = self._signal_and_noise(timesteps, noised)
        if self.prediction == "epsilon":
            return (noised - sigma * prediction) / signal, prediction
        return signal * noised - sigma * prediction, sigma * noised + signal * prediction

    def weights(self, timesteps: Tensor, min_snr_gamma: float | None) -> Tensor:
        """Weight of each row in the loss.

        Source: METHOD.md section 7: uniform. With ``min_snr_gamma`` those of min-SNR weighting (Hang et al., ICCV 2023,
        arXiv 2303.09556): ``min(SNR, gamma) / SNR`` for noise, ``min(SNR, gamma) / (SNR + 1)`` for v.

        Args:
            timesteps: Training index of each row, int64 (batch,).
            min_snr_gamma: Gamma, 5 in that paper; ``None``: uniform.

        Returns:
            (batch,), float32.
        """
        if min_snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps].float()
        snr = alpha / (1 - alpha)
        if self.prediction == "epsilon":
            return (min_snr_gamma / snr).clamp(max=1)  # 1 also where SNR is 0
        return snr.clamp(max=min_snr_gamma) / (snr + 1)

    def _signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps].float()[:, None, None, None]
        return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)
