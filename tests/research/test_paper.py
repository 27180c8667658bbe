"""The paper's ablations beside ours: the verdict follows from the numbers of both."""

import numpy as np

from research.demo_model.train_variants import VARIANTS
from research.evidence.paper import (
    CHOSEN_VARIANT,
    PAPER_ABLATIONS,
    REPEATED_VARIANT,
    compare_with_paper,
)

CHOSEN = np.random.default_rng(0).uniform(0.4, 0.8, size=60)


def verdicts(**gains: float) -> dict[str, str]:
    matches = {name.replace("_", "-"): (CHOSEN + gain).tolist() for name, gain in gains.items()}
    rows = compare_with_paper({CHOSEN_VARIANT: CHOSEN.tolist(), **matches})
    return {row[1]: row[-1] for row in rows}


def test_every_ablation_of_the_paper_can_be_trained():
    for ablation in PAPER_ABLATIONS:
        assert {ablation.variant, ablation.against} <= set(VARIANTS)
    assert {CHOSEN_VARIANT, REPEATED_VARIANT} <= set(VARIANTS)


def test_what_is_worse_in_both_agrees():
    assert verdicts(layers_encoder=-0.1, timestep_300=-0.1) == {
        "layers-encoder": "agrees",
        "timestep-300": "agrees",
    }


def test_what_is_equal_in_both_agrees():
    assert verdicts(caption=0.0) == {"caption": "agrees"}


def test_too_few_triples_to_tell_are_no_agreement():
    spread = np.random.default_rng(1).normal(scale=0.5, size=len(CHOSEN))
    matches = {CHOSEN_VARIANT: CHOSEN.tolist(), "caption": (CHOSEN + spread).tolist()}
    assert [row[-1] for row in compare_with_paper(matches)] == ["not told apart here"]


def test_what_another_seed_alone_brings_is_no_difference():
    assert verdicts(layers_encoder=-0.1, chosen_again=-0.05) == {"layers-encoder": "agrees"}
    assert verdicts(layers_encoder=-0.1, chosen_again=0.12) == {
        "layers-encoder": "not told apart here"
    }


def test_it_is_said_what_a_variant_is_held_against():
    matches = {"merge-sum": CHOSEN.tolist(), "init-identity": CHOSEN.tolist()}
    assert [row[2] for row in compare_with_paper(matches)] == ["init-identity"]


def test_the_merge_is_compared_from_equal_starts():
    assert verdicts(merge_sum=-0.1, init_identity=-0.1)["merge-sum"] == "agrees"
    assert "merge-sum" not in verdicts(merge_sum=0.0)


def test_what_turns_round_is_said():
    found = verdicts(layers_encoder=0.1, caption=-0.1)
    assert found["layers-encoder"] == "better here, worse in the paper"
    assert found["caption"] == "worse here, as good in the paper"


def test_what_our_intervals_do_not_tell_apart_is_said():
    assert verdicts(data_16th=0.0) == {"data-16th": "not told apart here"}


def test_nothing_is_compared_without_the_chosen_variant():
    assert list(compare_with_paper({"merge-sum": [0.5, 0.6]})) == []
