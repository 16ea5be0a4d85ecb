"""Means of pairs, kept by subject and prompt: one table gives every reduction that the papers use, and intervals."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from vislora.errors import InputError

REDUCTIONS = ("flat", "subject", "prompt")


@dataclass
class Cells:
    """{(subject, prompt): [sum, count]} of a metric's values, in float64."""

    table: dict[tuple[Hashable, Hashable], list[float]] = field(default_factory=dict)

    def add(self, subject: Hashable, prompt: Hashable, values) -> None:
        """Add the values of some pairs (or images) of one subject and prompt."""
        values = np.asarray(values, dtype=np.float64)
        cell = self.table.setdefault((subject, prompt), [0.0, 0])
        cell[0] += float(values.sum())
        cell[1] += values.size

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(count for _, count in self.table.values())

    def mean(self, reduction: str = "flat") -> float | None:
        """flat: over all values. subject: over a subject's, then over subjects. prompt: over a cell's, then over a
        subject's cells, then over subjects. None without values."""
        if not self.count:
            return None
        sums, counts = self._arrays()
        return float(_reduce(sums[None], counts[None], reduction)[0])

    def by(self, axis: int) -> dict[str, float]:
        """{subject: mean} (axis 0) or {prompt: mean} (axis 1), over values."""
        totals: dict[str, list[float]] = {}
        for key, (total, count) in self.table.items():
            one = totals.setdefault(str(key[axis]), [0.0, 0])
            one[0] += total
            one[1] += count
        return {name: total / count for name, (total, count) in totals.items() if count}

    def interval(
        self, reduction: str = "flat", resamples: int = 1000, level: float = 0.95, seed: int = 0
    ) -> list[float] | None:
        """The percentile bootstrap interval [low, high] of `mean`: subjects are drawn with replacement, and within each
        its prompts. None where there is one cell alone, or none."""
        if len(self.table) < 2 or not self.count:
            return None
        sums, counts = self._arrays()
        rng, (subjects, _) = np.random.default_rng(seed), sums.shape
        widths = (counts > 0).sum(1)  # prompts of each subject, which come first in its row
        means = []
        for start in range(0, resamples, 100):  # a hundred at a time, so that 30 x 25 cells take megabytes
            size = min(100, resamples - start)
            rows = rng.integers(0, subjects, (size, subjects))
            places = (rng.random((size, subjects, sums.shape[1])) * widths[rows][..., None]).astype(int)
            kept = np.arange(sums.shape[1]) < widths[rows][..., None]
            drawn = [np.where(kept, part[rows[..., None], places], 0) for part in (sums, counts)]
            means.append(_reduce(*drawn, reduction))
        low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
        return [float(low), float(high)]

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums and counts (subjects, prompts), the filled cells of a row first."""
        rows: dict[Hashable, list[list[float]]] = {}
        for (subject, _), cell in sorted(self.table.items(), key=lambda item: tuple(map(str, item[0]))):
            if cell[1]:
                rows.setdefault(subject, []).append(cell)
        width = max(map(len, rows.values()))
        sums, counts = np.zeros((len(rows), width)), np.zeros((len(rows), width))
        for i, row in enumerate(rows.values()):
            sums[i, : len(row)], counts[i, : len(row)] = zip(*row, strict=True)
        return sums, counts


def _reduce(sums: np.ndarray, counts: np.ndarray, reduction: str) -> np.ndarray:
    """(n,) means of n tables (n, subjects, prompts)."""
    if reduction == "flat":
        return sums.sum((1, 2)) / counts.sum((1, 2))
    if reduction == "subject":
        return (sums.sum(2) / counts.sum(2)).mean(1)
    if reduction == "prompt":
        own = np.where(counts > 0, sums / np.maximum(counts, 1), 0)
        return (own.sum(2) / (counts > 0).sum(2)).mean(1)
    raise InputError("reduction", f"{reduction!r} is unknown", f"one of {', '.join(REDUCTIONS)}")
