"""What a comparison of two methods in a sweep comes to.

Differences are taken seed by seed (and subject by subject, then averaged), and have a 95 % interval of Student's t over
seeds. Where the interval lies wholly on the claimed side (beyond the margin) the comparison is shown, wholly on the
other it is opposite; else, and with one seed, it is not shown. A comparison one of whose runs is missing or failed is
not run, whatever the others say. A claim is shown where all of its comparisons are, opposite where none is shown and
one is opposite, not run where one of them is not, and not shown otherwise. Intervals are not widened for their number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vislora.sweep.plan import Cell, Plan
from vislora.sweep.table import Mean, Row, over_seeds

RULE = __doc__.partition("\n\n")[2].strip()
SHOWN, NOT_SHOWN, OPPOSITE, MISSING = "shown", "not shown", "opposite", "not run"


@dataclass(frozen=True)
class Comparison:
    """One column of one method held against another method's, or a number."""

    plan: str
    column: str
    method: str
    other: str | float
    above: bool
    where: dict[str, Any] = field(default_factory=dict)
    since: dict[str, Any] | None = None
    worst: str | None = None
    margin: float = 0.0

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in self.where.items()]
        words += [f"less that at {name} {value}" for name, value in (self.since or {}).items()]
        words += [f"the worst {self.worst}"] if self.worst else []
        side = "above" if self.above else "below"
        slack = f" less {self.margin:g}" if self.margin and self.above else f" plus {self.margin:g}" * bool(self.margin)
        about = f" ({', '.join(words)})" if words else ""
        return f"{self.column}{about} of {self.method} {side} {self.other}{slack}"


@dataclass(frozen=True)
class Judged:
    """A comparison's outcome: the mean difference (method less other) with its interval, None where there is none yet.

    missing: how many pairs of runs (or runs, against a number) the difference still lacks; failed: that many runs of
    either side have failed. Where a pair is missing the difference is of the others alone.
    """

    comparison: Comparison
    difference: Mean | None
    verdict: str
    missing: int = 0
    failed: int = 0


def judge(one: Comparison, plan: Plan, found: Sequence[Row]) -> Judged:
    """Hold a comparison against the rows of its plan, by the rule above."""
    ours = _values(one, one.method, plan, found)
    theirs = _values(one, one.other, plan, found) if isinstance(one.other, str) else dict.fromkeys(ours, one.other)
    both = [key for key in ours if key in theirs]
    mean = over_seeds([(seed, ours[subject, seed] - theirs[subject, seed]) for subject, seed in both])
    missing = len(plan.subjects) * len(plan.seeds) - len(both)
    if mean is None or missing:
        sides = (one.method, one.other)
        looked = [r for r in found if r.cell.method in sides and (meant(one, r.cell) or r.cell.varied == one.since)]
        failed = sum(bool(row.failure) for row in looked if row.cell.tuning is None)
        return Judged(one, mean, MISSING, missing, failed)
    if math.isnan(mean.half):
        return Judged(one, mean, NOT_SHOWN)
    ahead = (mean.value if one.above else -mean.value) + one.margin
    verdict = SHOWN if ahead > mean.half else OPPOSITE if ahead < -mean.half else NOT_SHOWN
    return Judged(one, mean, verdict)


def meant(one: Comparison, cell: Cell) -> bool:
    """Whether a comparison looks at a cell; of a factor, the point that it is varied around counts too."""
    return cell.tuning is None and {n: v for n, v in cell.varied.items() if n != one.worst} == one.where


def _values(one: Comparison, method: str, plan: Plan,
            found: Sequence[Row]) -> dict[tuple[str | None, int], float]:  # fmt: skip
    """{(subject, seed): the column of a method as the comparison means it}, where all its runs ended well."""
    by: dict[tuple[str | None, int], list[float]] = {}
    base: dict[tuple[str | None, int], float] = {}
    for row in found:
        cell, value = row.cell, row.values[one.column]
        if cell.method != method or cell.tuning is not None or value is None:
            continue
        key = cell.subject, cell.seed
        if cell.varied == one.since:
            base[key] = value
        if meant(one, cell):
            by.setdefault(key, []).append(value)
    whole = Counter((c.subject, c.seed) for c in plan.cells({}) if c.method == method and meant(one, c))
    worst = min if one.above else max
    out = {key: worst(values) for key, values in by.items() if len(values) == whole[key]}
    return out if one.since is None else {key: out[key] - base[key] for key in out if key in base}


def verdict(judged: Sequence[Judged]) -> str:
    """Of a claim, from its comparisons'."""
    said = [one.verdict for one in judged]
    if not said or MISSING in said:
        return MISSING
    if all(word == SHOWN for word in said):
        return SHOWN
    return OPPOSITE if OPPOSITE in said and SHOWN not in said else NOT_SHOWN
