"""The paper's ablations beside those replayed on the demo model: does what was better there come out better here?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dreamcache_core.evaluation.statistics import Interval

from .statistics import difference_interval

CHOSEN_VARIANT = "chosen"
REPEATED_VARIANT = "chosen-again"
"""The chosen one, trained once more from another seed: how much chance alone brings."""

SAME_IN_PAPER = 0.005
"""Differences in CLIP-I up to which the paper's variants count as equal."""

SAME_HERE = 0.03
"""Differences in subject match up to which ours do, if all of the interval lies within."""

TITLES = ("ablation", "variant", "held against", "paper: gains", "here: gains", "order")
TOLD = {-1: "worse", 0: "as good", 1: "better"}


@dataclass(frozen=True)
class PaperAblation:
    """One variant that the paper compared with what it chose (METHOD.md section 8, ablations).

    Attributes:
        ablation: What was varied.
        variant: Its name in ``train_variants``.
        gain: CLIP-I of the variant minus that of the chosen one; None: the paper says that it is worse, without a number.
        against: Variant that differs from it in nothing else.
    """

    ablation: str
    variant: str
    gain: float | None
    against: str = CHOSEN_VARIANT

    @property
    def direction(self) -> int:
        """-1 where the variant was worse than the chosen one, 1 where it was better, 0 where they were equal."""
        if self.gain is None:
            return -1
        return 0 if abs(self.gain) <= SAME_IN_PAPER else (1 if self.gain > 0 else -1)


PAPER_CHOSEN = 0.810
PAPER_ABLATIONS = (
    PaperAblation("cached layers", "layers-encoder", 0.721 - PAPER_CHOSEN),
    PaperAblation("cached layers", "layers-middle", 0.716 - PAPER_CHOSEN),
    PaperAblation("cached layers", "layers-decoder", 0.799 - PAPER_CHOSEN),
    PaperAblation("cached layers", "layers-all", 0.813 - PAPER_CHOSEN),
    PaperAblation("integration", "merge-sum", 0.812 - PAPER_CHOSEN, against="init-identity"),
    PaperAblation("text while caching", "caption", 0.811 - PAPER_CHOSEN),
    PaperAblation("training data", "data-4th", 0.797 - PAPER_CHOSEN),
    PaperAblation("training data", "data-16th", 0.781 - PAPER_CHOSEN),
    PaperAblation("timestep of the cache", "timestep-150", None),
    PaperAblation("timestep of the cache", "timestep-300", None),
)
"""Half and an eighth of the paper's data stand where ours are a fourth and a sixteenth."""


def compare_with_paper(matches: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, ...]]:
    """Lay the paper's ablations beside ours.

    Args:
        matches: Subject matches of each variant, by its name, over the same triples.

    Yields:
        Cells of a row, one for each of ``TITLES``; none for a variant that is missing, itself or what it is held against.

    Raises:
        InputError: The variants were measured on different triples.
        MissingPackageError: scipy is not installed.
    """
    noise = chance_of_training(matches)
    for ablation in PAPER_ABLATIONS:
        if ablation.variant not in matches or ablation.against not in matches:
            continue
        ours = difference_interval(matches[ablation.variant], matches[ablation.against])
        there = TOLD[-1] if ablation.gain is None else f"{ablation.gain:+.3f}"
        order = _verdict(ablation, ours, abs(noise.value) if noise else 0.0)
        yield ablation.ablation, ablation.variant, ablation.against, there, str(ours), order


def chance_of_training(matches: Mapping[str, Sequence[float]]) -> Interval | None:
    """What the chosen variant gains when it is trained again from another seed; None where one of the two is missing.

    Args:
        matches: As ``compare_with_paper`` takes them.
    """
    if not {CHOSEN_VARIANT, REPEATED_VARIANT} <= set(matches):
        return None
    return difference_interval(matches[REPEATED_VARIANT], matches[CHOSEN_VARIANT])


def _verdict(ablation: PaperAblation, ours: Interval, noise: float) -> str:
    """Compare directions; ours has none where the interval holds 0, or another seed alone makes as much."""
    here = 1 if ours.low > 0 else (-1 if ours.high < 0 else 0)
    is_same = ours.low >= -SAME_HERE and ours.high <= SAME_HERE
    if ablation.direction == 0 and is_same:
        return "agrees"
    if here == 0 or abs(ours.value) <= noise:
        return "not told apart here"
    if here == ablation.direction:
        return "agrees"
    return f"{TOLD[here]} here, {TOLD[ablation.direction]} in the paper"
