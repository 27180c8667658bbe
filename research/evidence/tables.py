"""The measurements of every condition as rows of tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamcache_core.demo.measures.match import SubjectMatch
from dreamcache_core.evaluation.statistics import Interval

from .conditions import CHOSEN, NO_REFERENCE, Condition
from .results import Judgement
from .statistics import difference_interval, gap_interval, mean_interval
from .triples import GROUPS, Group
from .truths import Truths

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


def summary_lines(evidence: Evidence) -> list[str]:
    """The main table in short, for a terminal: one line for each condition of the first group."""
    group = evidence.groups[0]
    return [
        f"{condition.name:>24}  match {mean_match(evidence.of(condition, group))}  "
        f"gap closed {_gap(evidence, condition, group)}  "
        f"obedience {mean_obedience(evidence.of(condition, group))}"
        for condition in evidence.rows
    ]


def table_cells(evidence: Evidence, condition: Condition, group: Group) -> list[str]:
    """Cells of a condition's row in the table of a group, one for each of ``TITLES``."""
    rows = evidence.of(condition, group)
    return [
        condition.name,
        f"{condition.predictions_a_step(evidence.steps):.2f}",
        str(mean_match(rows)),
        _gain(evidence, condition, group, CHOSEN, lambda row: row.match),
        str(_gap(evidence, condition, group)),
        f"{_mean(rows, lambda row: row.colour_error):.1f}",
        f"{_mean(rows, lambda row: row.pattern_agreement):.3f}",
        str(mean_obedience(rows)),
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


def mean_match(found: Sequence[Judgement] | Sequence[SubjectMatch]) -> Interval:
    """Average subject matches."""
    return mean_interval([each.match for each in found])


def mean_obedience(rows: Sequence[Judgement]) -> Interval:
    """Average the share of what the prompt names that is there."""
    return mean_interval([row.obedience for row in rows])


def _gap(evidence: Evidence, condition: Condition, group: Group) -> Interval:
    bounds = evidence.truths[group].bounds
    return gap_interval(
        [row.match for row in evidence.of(condition, group)],
        [found.match for found in bounds.lower],
        [found.match for found in bounds.upper],
    )


def _mean(rows: Sequence[Judgement], value: Callable[[Judgement], float]) -> float:
    return sum(value(row) for row in rows) / len(rows)
