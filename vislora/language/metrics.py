"""GLUE's metrics by their definitions: accuracy, F1, Matthews' and Pearson's correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence


def accuracy(found: Sequence[int], wanted: Sequence[int]) -> float:
    """The share of right labels."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def f1(found: Sequence[int], wanted: Sequence[int], positive: int = 1) -> float:
    """Of the label `positive`: the harmonic mean of precision and recall; 0 where neither side has it."""
    both = sum(a == b == positive for a, b in zip(found, wanted, strict=True))
    total = sum(a == positive for a in found) + sum(b == positive for b in wanted)
    return 2 * both / total if total else 0.0


def matthews(found: Sequence[int], wanted: Sequence[int]) -> float:
    """Matthews' correlation, for any number of labels (Gorodkin 2004); 0 where one side has a single label."""
    count, labels = len(wanted), set(found) | set(wanted)
    right = sum(a == b for a, b in zip(found, wanted, strict=True))
    pairs = [(sum(a == k for a in found), sum(b == k for b in wanted)) for k in labels]
    top = right * count - sum(f * w for f, w in pairs)
    bottom = (count**2 - sum(f * f for f, _ in pairs)) * (count**2 - sum(w * w for _, w in pairs))
    return top / math.sqrt(bottom) if bottom else 0.0


def pearson(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    count = len(wanted)
    a, b = sum(found) / count, sum(wanted) / count
    top = sum((x - a) * (y - b) for x, y in zip(found, wanted, strict=True))
    bottom = math.sqrt(sum((x - a) ** 2 for x in found) * sum((y - b) ** 2 for y in wanted))
    return top / bottom if bottom else 0.0


def spearman(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(found), _ranks(wanted))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks, at = [0.0] * len(values), 0
    while at < len(order):
        end = at
        while end + 1 < len(order) and values[order[end + 1]] == values[order[at]]:
            end += 1
        for place in order[at : end + 1]:
            ranks[place] = (at + end) / 2
        at = end + 1
    return ranks


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}
