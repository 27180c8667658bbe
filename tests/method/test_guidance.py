"""The three-term rule, its cheaper forms, and what each of them needs."""

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dreamcache_core.errors import InputError
from dreamcache_core.method.guidance import (
    Guidance,
    combine_guidance,
    fold_guidance,
    needed_predictions,
)

SCALES = st.floats(-3, 12)
ALL = ("unconditional", "reference_only", "reference_and_text")


def predictions() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    e_u, e_c, e_ct = torch.randn(3, 2, 4, 3, 5, generator=generator, dtype=torch.float64)
    return e_u, e_c, e_ct


def combine(guidance_scale: float, image_guidance_scale: float) -> Tensor:
    return combine_guidance(
        *predictions(), guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale
    )


def test_three_term_rule_in_numbers():
    e_u, e_c, e_ct = (torch.tensor([value]) for value in (1.0, 3.0, 10.0))
    guided = combine_guidance(e_u, e_c, e_ct, guidance_scale=2.0, image_guidance_scale=0.5)
    assert guided.item() == 1 + 2 * (10 - 3) + 0.5 * (3 - 1)


@settings(max_examples=50, deadline=None)
@given(SCALES, SCALES)
def test_rule_is_a_weighted_sum(guidance_scale: float, image_guidance_scale: float):
    e_u, e_c, e_ct = predictions()
    weights = (1 - image_guidance_scale, image_guidance_scale - guidance_scale, guidance_scale)
    assert math.isclose(sum(weights), 1, abs_tol=1e-9)
    expected = weights[0] * e_u + weights[1] * e_c + weights[2] * e_ct
    torch.testing.assert_close(combine(guidance_scale, image_guidance_scale), expected)


@settings(max_examples=50, deadline=None)
@given(SCALES, SCALES)
def test_classifier_free_guidance_on_folded_predictions_gives_the_rule(
    guidance_scale: float, image_guidance_scale: float
):
    conditional, unconditional = fold_guidance(
        *predictions(), image_guidance_scale=image_guidance_scale
    )
    guided = unconditional + guidance_scale * (conditional - unconditional)
    torch.testing.assert_close(guided, combine(guidance_scale, image_guidance_scale))


@settings(max_examples=20, deadline=None)
@given(SCALES)
def test_image_scale_one_cancels_the_unconditional_prediction(guidance_scale: float):
    _, e_c, e_ct = predictions()
    torch.testing.assert_close(combine(guidance_scale, 1.0), e_c + guidance_scale * (e_ct - e_c))


def test_both_scales_one_leave_the_last_prediction():
    torch.testing.assert_close(combine(1.0, 1.0), predictions()[2])


def test_both_scales_zero_leave_the_first_prediction():
    assert torch.equal(combine(0.0, 0.0), predictions()[0])


@pytest.mark.parametrize(
    ("mode", "image_guidance_scale", "guidance_scale", "needed"),
    [
        ("separate", 0.4, 7.5, ALL),
        ("separate", 0.4, 1.0, ALL),
        ("separate", 0.0, 7.5, ALL),
        ("separate", 1.0, 7.5, ALL[1:]),
        ("separate", 1.0, 1.0, ALL[2:]),
        ("joint", 0.4, 7.5, ("unconditional", "reference_and_text")),
        ("joint", 1.0, 7.5, ("unconditional", "reference_and_text")),
        ("joint", 0.4, 1.0, ALL[2:]),
    ],
)
def test_needed_predictions_are_as_few_as_algebra_allows(
    mode: Any, image_guidance_scale: float, guidance_scale: float, needed: tuple[str, ...]
):
    assert needed_predictions(Guidance(image_guidance_scale, mode), guidance_scale) == needed


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([1.0, 0.4]), st.sampled_from([1.0, 7.5]))
def test_predictions_that_are_not_needed_do_not_matter(
    image_guidance_scale: float, guidance_scale: float
):
    needed = needed_predictions(Guidance(image_guidance_scale), guidance_scale)
    spoilt = [
        value if name in needed else value + 100
        for name, value in zip(ALL, predictions(), strict=True)
    ]
    guided = combine_guidance(
        spoilt[0],
        spoilt[1],
        spoilt[2],
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
    )
    torch.testing.assert_close(guided, combine(guidance_scale, image_guidance_scale))


@pytest.mark.parametrize(
    ("progress", "scale"), [(0.0, 1.0), (0.2, 0.4), (0.5, 0.4), (0.6, 1.0), (1.0, 1.0)]
)
def test_image_scale_holds_from_the_start_of_its_range_to_before_its_end(
    progress: float, scale: float
):
    assert Guidance(0.4, image_range=(0.2, 0.6)).at(progress).image_guidance_scale == scale


@pytest.mark.parametrize("progress", [-0.01, 0.0, 0.5, 1.0, 1.01])
def test_the_whole_run_holds_every_step_of_any_scheduler(progress: float):
    assert Guidance(0.4).at(progress) == Guidance(0.4)


@pytest.mark.parametrize("bad", [(0.5, 0.5), (0.6, 0.5), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_range_that_is_no_part_of_the_run_is_refused(bad: tuple[float, float]):
    with pytest.raises(InputError, match="start before its end"):
        Guidance(image_range=bad)


def test_the_default_needs_two_predictions():
    assert Guidance() == Guidance(image_guidance_scale=1.0, mode="separate")
    assert not Guidance().needs_unconditional


def test_unknown_mode_is_refused():
    with pytest.raises(InputError, match=r"'separate' or 'joint'; given 'both'"):
        Guidance(mode=cast("Any", "both"))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, "0.4", None])
def test_image_scale_that_is_no_finite_number_is_refused(scale: Any):
    with pytest.raises(InputError, match="must be a finite number; given"):
        Guidance(image_guidance_scale=scale)
