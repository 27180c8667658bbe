"""A run has one guidance, however many Apply nodes there are."""

import logging

import pytest
import torch
from tiny import apply, encode, make_adapters, make_model, said_by_apply, sample


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        model = make_model()
        return model, make_adapters(model), encode(model)


DEFAULTS = {"image_guidance": 1.0}
FORMER_DEFAULTS = {"image_guidance": 0.4}


def chain(parts, *settings):
    """Apply nodes one after the other, and what the last one says."""
    model, adapters, reference = parts
    *before, last = [DEFAULTS | given for given in settings]
    for given in before:
        model = apply(model, adapters, reference, **given)
    return apply(model, adapters, reference, **last), said_by_apply(
        model, adapters, reference, **last
    )


@pytest.mark.parametrize("untouched", [DEFAULTS, FORMER_DEFAULTS], ids=["new", "saved"])
@pytest.mark.parametrize("first", [{"image_guidance": 3.0}, {"guidance": "joint"}])
def test_an_untouched_apply_inherits_the_guidance_before_it_and_says_so(
    parts, caplog, first, untouched
):
    with caplog.at_level(logging.WARNING):
        ours, said = chain(parts, first, untouched, untouched)
    expected, _ = chain(parts, first, first, first)
    assert torch.equal(sample(ours, steps=1), sample(expected, steps=1))
    assert ("joint" if "guidance" in first else "image_guidance 3") in said
    assert not caplog.text


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            {"image_guidance": 3.0},
            {"image_guidance": 2.0},
            ("image_guidance 3", "image_guidance 2"),
        ),
        ({"guidance": "joint"}, {"image_guidance": 2.0}, ("joint", "image_guidance 2")),
        ({"image_guidance": 3.0}, {"guidance": "joint"}, ("image_guidance 3", "joint")),
    ],
)
def test_of_two_guidances_the_last_holds_and_the_conflict_is_said(
    parts, caplog, first, second, words
):
    with caplog.at_level(logging.WARNING):
        ours, said = chain(parts, first, second)
    expected, _ = chain(parts, second, second)
    assert torch.equal(sample(ours, steps=1), sample(expected, steps=1))
    assert all(word in said and word in caplog.text for word in words)


@pytest.mark.parametrize(
    "settings",
    [
        ({}, {}),
        ({}, {"image_guidance": 3.0}),
        (FORMER_DEFAULTS, {"image_guidance": 3.0}),
        ({}, FORMER_DEFAULTS),
        ({"guidance": "joint"},) * 2,
    ],
)
def test_applies_that_agree_say_nothing_about_guidance(parts, caplog, settings):
    with caplog.at_level(logging.WARNING):
        _, said = chain(parts, *settings)
    assert "guidance" not in said
    assert "joint" not in said
    assert not caplog.text


@pytest.mark.parametrize("second", [{"image_guidance": 3.0}, FORMER_DEFAULTS])
def test_the_guidance_after_an_untouched_apply_is_that_of_the_run(parts, second):
    ours, _ = chain(parts, {}, second)
    expected, _ = chain(parts, second, second)
    assert torch.equal(sample(ours, steps=1), sample(expected, steps=1))
