"""Scores of one run over its steps: the curve, its picture, and the step that flatters it most."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SHOWN = ("dino", "clip_t", "lpips_div", "pres", "drift_dino", "drift_denoising")


def best_of(points: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """The metrics of the step with the highest DINO on the very prompts that are reported, as NB-LoRA's Table 3 takes
    them. A choice by what is reported is biased towards it: it stands beside a result, never for one."""
    step, result = max(points, key=lambda point: point[1]["metrics"]["dino"])
    return {"step": step, "metrics": result["metrics"], "biased": "chosen by the reported DINO among all steps"}


def write(folder: Path, points: Sequence[tuple[int, dict[str, Any]]]) -> Path:
    """folder/over_steps.json, with metrics and intervals of each step, and over_steps.png; returns the picture.

    points: (step, a result of `vislora.metrics.score.Scorer`), by step.
    """
    from matplotlib.figure import Figure  # no global state, no display

    told = [{"step": step, **{key: result[key] for key in ("metrics", "intervals")}} for step, result in points]
    (folder / "over_steps.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    shown = [name for name in _SHOWN if points[0][1]["metrics"].get(name) is not None]
    figure = Figure(figsize=(9, 2.6 * -(-len(shown) // 2)), layout="constrained")
    steps = [step for step, _ in points]
    column = points[0][1]["record"]["lpips_column"]
    for axis, name in zip(figure.subplots(-(-len(shown) // 2), 2, squeeze=False).flat, shown, strict=False):
        values = [result["metrics"][name] for _, result in points]
        low, high = zip(*(result["intervals"][name] or (value, value)
                          for value, (_, result) in zip(values, points, strict=True)), strict=True)  # fmt: skip
        axis.fill_between(steps, low, high, alpha=0.2)
        axis.plot(steps, values, marker="o", markersize=4)
        axis.set(title=name.replace("lpips", column), xlabel="training step")
        axis.grid(alpha=0.3)
    for axis in figure.axes[len(shown) :]:
        axis.remove()
    figure.savefig(folder / "over_steps.png", dpi=120)
    return folder / "over_steps.png"
