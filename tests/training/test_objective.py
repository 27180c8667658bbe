"""The objective against hand-computed numbers (METHOD.md section 7)."""

import pytest
import torch

from dreamcache_core import InputError
from dreamcache_core.fitting.noise_schedule import NoiseSchedule
from dreamcache_core.training.objective import denoising_loss

ALPHAS = torch.tensor([0.64, 0.36, 0.0])
LATENT = torch.tensor([2.0, 3.0, 5.0])[:, None, None, None].expand(3, 2, 1, 4)
NOISE = torch.tensor([1.0, -1.0, 7.0])[:, None, None, None].expand(3, 2, 1, 4)
STEPS = torch.tensor([0, 1, 2])


def rows(tensor: torch.Tensor) -> list[float]:
    assert bool((tensor == tensor[:, :1, :1, :1]).all())
    return tensor[:, 0, 0, 0].tolist()


def test_noising_mixes_latent_and_noise_by_each_rows_own_level() -> None:
    noised = NoiseSchedule(ALPHAS).add_noise(LATENT, NOISE, STEPS)
    assert rows(noised) == pytest.approx([0.8 * 2 + 0.6 * 1, 0.6 * 3 - 0.8 * 1, 7])


def test_target_is_the_noise_or_v() -> None:
    assert rows(NoiseSchedule(ALPHAS).target(LATENT, NOISE, STEPS)) == [1, -1, 7]
    v = NoiseSchedule(ALPHAS, "v_prediction").target(LATENT, NOISE, STEPS)
    assert rows(v) == pytest.approx([0.8 * 1 - 0.6 * 2, -0.6 * 1 - 0.8 * 3, -5])


def test_weights_are_uniform_without_min_snr() -> None:
    assert NoiseSchedule(ALPHAS).weights(STEPS, None).tolist() == [1, 1, 1]


def test_min_snr_weights_of_noise_and_v() -> None:
    first_two = STEPS[:2]  # SNR 16/9 and 9/16
    weights = NoiseSchedule(ALPHAS).weights(first_two, 1.0)
    assert weights.tolist() == pytest.approx([9 / 16, 1])
    v_weights = NoiseSchedule(ALPHAS, "v_prediction").weights(STEPS, 1.0)
    assert v_weights.tolist() == pytest.approx([9 / 25, 9 / 25, 0])


def test_min_snr_weight_of_pure_noise_is_finite() -> None:
    assert NoiseSchedule(ALPHAS).weights(torch.tensor([2]), 5.0).tolist() == [1.0]


def test_loss_is_the_weighted_mean_of_the_rows_and_in_float32() -> None:
    prediction = torch.zeros(2, 1, 1, 4, dtype=torch.float16)
    target = torch.tensor([[300.0] * 4, [2.0] * 4]).reshape(2, 1, 1, 4)
    loss = denoising_loss(prediction, target, torch.tensor([1.0, 0.5]))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx((90000 + 0.5 * 4) / 2)


def test_models_that_predict_something_else_are_refused() -> None:
    with pytest.raises(InputError, match="predicts 'sample'"):
        NoiseSchedule(ALPHAS, "sample")
