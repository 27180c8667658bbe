"""The evidence as a page of tables with plots beside it, written from the measurements of every condition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamcache_core.demo.measures.match import SubjectMatch
from dreamcache_core.evaluation.statistics import Interval
from dreamcache_core.files.whole_files import whole_file

from .conditions import CHOSEN, NO_REFERENCE, Condition
from .paper import (
    CHOSEN_VARIANT,
    SAME_HERE,
    SAME_IN_PAPER,
    chance_of_training,
    compare_with_paper,
)
from .paper import TITLES as PAPER_TITLES
from .plots import Bar, Sweep, SweepPoint, plot_bars, plot_pareto
from .results import Judgement
from .statistics import difference_interval, gap_interval, mean_interval
from .triples import GROUPS, Group
from .truths import Truths

PAGE, PARETO, COST, BARS = "README.md", "pareto.png", "cost.png", "ablations.png"
PARETO_SWEEPS = ("image guidance", "text guidance", "joint", "baseline")
COST_SWEEPS = ("image guidance", "guidance range", "joint", "baseline")
GROUP_TITLES: Mapping[Group, str] = {
    "combination": "Known shapes in unseen patterns and colours",
    "shape": "Unseen shapes",
}
TITLES = (
    "condition",
    "predictions a step",
    "subject match",
    "match gained on as shipped",
    "gap closed",
    "colour error",
    "pattern",
    "obedience",
    "background",
    "shape",
    "obedience gained on no reference",
)


@dataclass(frozen=True)
class Evidence:
    """All that was measured.

    Attributes:
        rows: Rows of each condition, in the triples' order.
        truths: True renders of the same triples, by group.
        command: What was called.
        steps: Sampling steps of every image.
        settings: What the measurements depend on, by name.
    """

    rows: Mapping[Condition, Sequence[Judgement]]
    truths: Mapping[Group, Truths]
    command: str
    steps: int
    settings: Mapping[str, Any]

    def of(self, condition: Condition, group: Group) -> list[Judgement]:
        """Rows of one group under one condition."""
        return [row for row in self.rows[condition] if row.group == group]

    @property
    def groups(self) -> list[Group]:
        """Groups with measurements."""
        return [group for group in GROUPS if group in self.truths]


def write_pages(evidence: Evidence, out: Path) -> list[Path]:
    """Write the page and its plots.

    Args:
        evidence: The measurements.
        out: The folder; made where it is missing.

    Returns:
        The files.

    Raises:
        MissingPackageError: scipy or matplotlib is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [out / PAGE]
    title = GROUP_TITLES["combination"]
    if sweeps := _sweeps(evidence, PARETO_SWEEPS, _obedience_of):
        plot_pareto(sweeps, out / PARETO, title=title)
        files.append(out / PARETO)
    if sweeps := _sweeps(evidence, COST_SWEEPS, _cost_of):
        plot_pareto(sweeps, out / COST, xlabel=TITLES[1], title=title)
        files.append(out / COST)
    bars = _bars(evidence)
    if bars:
        plot_bars(bars, out / BARS, ylabel="subject match", title=title)
        files.append(out / BARS)
    with whole_file(out / PAGE) as unfinished:
        unfinished.write_text("\n".join(_lines(evidence, files)) + "\n", encoding="utf-8")
    return files


def summary_lines(evidence: Evidence) -> list[str]:
    """The main table in short, for a terminal: one line for each condition of the first group."""
    group = evidence.groups[0]
    return [
        f"{condition.name:>24}  match {_match(evidence.of(condition, group))}  "
        f"gap closed {_gap(evidence, condition, group)}  "
        f"obedience {_obedience(evidence.of(condition, group))}"
        for condition in evidence.rows
    ]


def _lines(evidence: Evidence, files: Iterable[Path]) -> Iterable[str]:
    names = {path.name for path in files}
    yield "# Measured on the demo model"
    yield ""
    yield f"Written by `{evidence.command}`."
    yield ""
    yield (
        "Brackets hold 95 % confidence intervals (bootstrap over triples: they do not say how another training would turn "
        "out). An interval without width means that all triples gave the same; of n triples, up to 3/n of others may differ."
    )
    yield ""
    yield from _row(["setting", "value"])
    yield from _row(["---", "---"])
    for name, value in evidence.settings.items():
        yield from _row([name, str(value)])
    yield ""
    for group in evidence.groups:
        yield from _group_lines(evidence, group)
    if PARETO in names:
        yield f"![Subject match against scene obedience]({PARETO})"
        yield ""
    if COST in names:
        yield f"![Subject match against predictions a step]({COST})"
        yield ""
    if BARS in names:
        yield f"![Ablations]({BARS})"
        yield ""
    yield from _paper_lines(evidence)


def _group_lines(evidence: Evidence, group: Group) -> Iterable[str]:
    truths = evidence.truths[group]
    bounds = truths.bounds
    yield f"## {GROUP_TITLES[group]}"
    yield ""
    yield (
        f"{len(bounds.upper)} triples of subject, scene and seed. True images of the subject match "
        f"{_match_of(bounds.upper)} (upper bound), true images of other subjects of its shape "
        f"{_match_of(bounds.lower)} (lower bound); the measure tells the two apart with AUC "
        f"{bounds.separation(lambda found: found.match):.3f}. Through the model's autoencoder true images match "
        f"{_match_of(truths.decoded)}, about what can be had with it. The classifier recognises the background of "
        f"{truths.background:.1%} and the shape of {truths.shape:.1%} of the true images."
    )
    yield ""
    yield from _row(TITLES)
    yield from _row(["---"] * len(TITLES))
    for condition in evidence.rows:
        yield from _row(table_cells(evidence, condition, group))
    yield ""


def _paper_lines(evidence: Evidence) -> Iterable[str]:
    rows = list(compare_with_paper(_variant_matches(evidence)))
    if not rows:
        return
    yield "## The paper's ablations, replayed"
    yield ""
    yield (
        "The paper's numbers are CLIP-I on Stable Diffusion 1.5; ours are subject match, each variant trained once with "
        "the same short budget. They agree where both say better, worse, or no difference (paper: up to "
        f"{SAME_IN_PAPER}; here: all of the interval within {SAME_HERE} of 0)."
    )
    if (noise := chance_of_training(_variant_matches(evidence))) is not None:
        yield (
            f"The chosen variant trained once more from another seed gains {noise}: differences up to that size say "
            "nothing, whatever their interval."
        )
    yield ""
    yield from _row(PAPER_TITLES)
    yield from _row(["---"] * len(PAPER_TITLES))
    for row in rows:
        yield from _row(row)
    yield ""


def _variant_matches(evidence: Evidence) -> dict[str, list[float]]:
    """Subject matches of every variant on the first group, by the name of its adapters."""
    return {
        str(condition.adapters): [row.match for row in evidence.of(condition, evidence.groups[0])]
        for condition in evidence.rows
        if condition.sweep == "variants"
    }


def table_cells(evidence: Evidence, condition: Condition, group: Group) -> list[str]:
    """Cells of a condition's row in the table of a group, one for each of ``TITLES``."""
    rows = evidence.of(condition, group)
    return [
        condition.name,
        f"{condition.predictions_a_step(evidence.steps):.2f}",
        str(_match(rows)),
        _gain(evidence, condition, group, CHOSEN, lambda row: row.match),
        str(_gap(evidence, condition, group)),
        f"{_mean(rows, lambda row: row.colour_error):.1f}",
        f"{_mean(rows, lambda row: row.pattern_agreement):.3f}",
        str(_obedience(rows)),
        f"{_mean(rows, lambda row: float(row.background)):.3f}",
        f"{_mean(rows, lambda row: float(row.shape)):.3f}",
        _gain(evidence, condition, group, NO_REFERENCE, lambda row: row.obedience),
    ]


def _gain(
    evidence: Evidence,
    condition: Condition,
    group: Group,
    baseline: Condition,
    value: Callable[[Judgement], float],
) -> str:
    """What a condition has more than another on the same triples."""
    if baseline not in evidence.rows or condition.drawing == baseline.drawing:
        return ""
    ours, theirs = (
        [value(row) for row in evidence.of(each, group)] for each in (condition, baseline)
    )
    return str(difference_interval(ours, theirs))


def _is_chosen(condition: Condition) -> bool:
    """Whether a condition is what ships, or the variant that stands for it among equals."""
    return condition.drawing == CHOSEN.drawing or condition.adapters == CHOSEN_VARIANT


def _row(cells: Sequence[str]) -> Iterable[str]:
    yield f"| {' | '.join(cells)} |"


def _sweeps(
    evidence: Evidence, names: Sequence[str], cost: Callable[[Evidence, Condition], Interval]
) -> list[Sweep]:
    group = evidence.groups[0]
    sweeps: list[Sweep] = []
    for name in names:
        points = [
            SweepPoint(
                condition.name.removeprefix(name).strip(),
                cost(evidence, condition),
                _match(evidence.of(condition, group)),
                _is_chosen(condition),
            )
            for condition in evidence.rows
            if condition.sweep == name
        ]
        if points:
            sweeps.append(Sweep(name, points, is_joined=name != CHOSEN.sweep))
    return sweeps


def _obedience_of(evidence: Evidence, condition: Condition) -> Interval:
    return _obedience(evidence.of(condition, evidence.groups[0]))


def _cost_of(evidence: Evidence, condition: Condition) -> Interval:
    predictions = condition.predictions_a_step(evidence.steps)
    return Interval(predictions, predictions, predictions)


def _bars(evidence: Evidence) -> list[tuple[str, list[Bar]]]:
    group, groups = evidence.groups[0], dict[str, list[Bar]]()
    for condition in evidence.rows:
        if condition.sweep not in (*PARETO_SWEEPS, *COST_SWEEPS):
            bar = Bar(condition.name, _match(evidence.of(condition, group)), _is_chosen(condition))
            groups.setdefault(condition.sweep, []).append(bar)
    return list(groups.items())


def _match(rows: Sequence[Judgement]) -> Interval:
    return mean_interval([row.match for row in rows])


def _obedience(rows: Sequence[Judgement]) -> Interval:
    return mean_interval([row.obedience for row in rows])


def _gap(evidence: Evidence, condition: Condition, group: Group) -> Interval:
    bounds = evidence.truths[group].bounds
    return gap_interval(
        [row.match for row in evidence.of(condition, group)],
        [found.match for found in bounds.lower],
        [found.match for found in bounds.upper],
    )


def _match_of(found: Sequence[SubjectMatch]) -> Interval:
    return mean_interval([each.match for each in found])


def _mean(rows: Sequence[Judgement], value: Callable[[Judgement], float]) -> float:
    return sum(value(row) for row in rows) / len(rows)
