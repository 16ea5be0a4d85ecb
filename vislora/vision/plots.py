"""Pictures: accuracy on both tasks against steps, confusion, adaptation against forgetting, one hyper-parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

Points = Sequence[tuple[float, float]]


def _axes(columns: int = 1, width: float = 5.0, height: float = 4.0):
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns))


def over_steps(file: Path, curves: Mapping[str, Mapping[str, Points]], ratio: bool = True) -> Path:
    """Accuracy on target and source, and the largest nuclear-norm ratio, against steps (NB-LoRA, Figure 6).

    curves: {run: {"validation_accuracy" | "source_accuracy" | "nuclear_ratio": [(step, value)]}}. Where no run has a
    source accuracy by the kept head, that by neighbours or the features' CKA stands in its place.
    """
    old = {"source_accuracy": "source accuracy", "source_knn20_accuracy": "source accuracy by 20 neighbours",
           "source_knn10_accuracy": "source accuracy by 10 neighbours",
           "source_feature_cka": "linear CKA of the source's features"}  # fmt: skip
    key = next((key for key in old if any(key in own for own in curves.values())), "source_accuracy")
    names = {"validation_accuracy": "target accuracy", key: old[key]}
    if ratio and any(any(y > 0 for _, y in c.get("nuclear_ratio", ())) for c in curves.values()):
        names["nuclear_ratio"] = "largest nuclear-norm ratio"
    figure, axes = _axes(len(names))
    for axis, (key, title) in zip(axes, names.items(), strict=True):
        for run, own in curves.items():
            points = [(x, y) for x, y in own.get(key, ()) if key != "nuclear_ratio" or y > 0]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=run)
        axis.set(xlabel="step", title=title)
        if key == "nuclear_ratio":
            axis.set_yscale("log")
        else:
            axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    if len(curves) > 1:
        axes[0].legend(fontsize=7)
    return _save(figure, file)


def confusion(file: Path, classes: Sequence[str], counts: Tensor) -> Path:
    """counts (classes, classes), rows the truth; shown as shares of each row."""
    shares = (counts / counts.sum(-1, keepdim=True).clamp_min(1)).numpy()
    figure, (axis,) = _axes(1, 6, 5.4)
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    if len(classes) <= 50:
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=6)
        axis.set_yticks(range(len(classes)), classes, fontsize=6)
    axis.set(xlabel="taken for", ylabel="true class")
    figure.colorbar(image, label="share of the class")
    return _save(figure, file)


def pareto_front(points: Points) -> list[int]:
    """Places of the points (source, target) that no other beats in one and equals or beats in the other, by source."""
    front = [
        i for i, (s, t) in enumerate(points)
        if not any((a >= s and b >= t) and (a > s or b > t) for a, b in points)
    ]  # fmt: skip
    return sorted(front, key=lambda i: points[i])


def trade_off(file: Path, groups: Mapping[str, Points], spread: Mapping[str, Points] | None = None) -> Path:
    """Target accuracy against source accuracy, a colour a method, and the Pareto front through all of them.

    groups: {method: [(source, target)]}; spread: half-widths of intervals of the same points.
    """
    figure, (axis,) = _axes(1, 6, 5)
    every = [point for points in groups.values() for point in points]
    front = [every[i] for i in pareto_front(every)]
    axis.step(*zip(*front, strict=True), where="pre", color="0.7", linewidth=1, label="Pareto front", zorder=1)
    for i, (method, points) in enumerate(groups.items()):
        x, y = zip(*points, strict=True)
        half = list(zip(*spread[method], strict=True)) if spread and method in spread else (None, None)
        marker = "osD^v<>pP*Xh"[i % 12]
        axis.errorbar(x, y, xerr=half[0], yerr=half[1], fmt=marker, linestyle="", capsize=2, label=method, zorder=2)
    axis.set(xlabel="source accuracy", ylabel="target accuracy", title="adaptation against forgetting")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return _save(figure, file)


def against(file: Path, title: str, lines: Mapping[str, Sequence[tuple[float, float, float]]], log: bool) -> Path:
    """The geometric mean over one hyper-parameter. lines: {method: [(value, mean, half-width)]}, in order."""
    figure, (axis,) = _axes()
    for method, points in lines.items():
        x, y, half = zip(*points, strict=True)
        axis.errorbar(x, y, yerr=[0 if h != h else h for h in half], marker="o", capsize=2, label=method)
    if log:
        axis.set_xscale("log")
    axis.set(xlabel=title, ylabel="geometric mean of source and target accuracy", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return _save(figure, file)


def _save(figure, file: Path) -> Path:
    figure.savefig(file, dpi=120)
    return file
