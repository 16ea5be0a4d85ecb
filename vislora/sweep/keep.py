"""Which checkpoint of a run to keep: the least forgetful of those whose subject is as good as the best one's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vislora.errors import InputError
from vislora.metrics import features
from vislora.metrics.backbones import Backbone
from vislora.metrics.cache import Cache
from vislora.metrics.pictures import examine, listing


@dataclass(frozen=True)
class Point:
    """A checkpoint on the fidelity-drift curve.

    fidelity: one value for each held-out prompt (such as DINO to the photos), the same prompts in the same order and
    from the same seeds at every step; more is better. drift: any measure of the distance to the base; less is better.
    """

    step: int
    fidelity: tuple[float, ...]
    drift: float

    @property
    def mean(self) -> float:
        return math.fsum(self.fidelity) / len(self.fidelity)


def keep(points: Sequence[Point], max_drift: float | None = None) -> Point:
    """The checkpoint that a user should keep, by the one-standard-error rule (Breiman et al. 1984, section 3.4.3).

    The best fidelity is the highest mean over prompts. A checkpoint is as good when its mean falls short of that by no
    more than the standard error of the shortfall, prompt by prompt; of those, the one with the least drift is kept,
    and of equals the earliest. Unlike the rule's origin the errors are of paired differences: prompts differ more
    from each other than checkpoints do. With one prompt there is no error to know, and only equals are as good.

    The order of the points, and any increasing function of drift, change nothing. max_drift: checkpoints beyond it
    are out. The prompts must be held out: a choice made on those that are reported flatters the run.

    Raises InputError without points, for points of other prompts, for numbers that are not finite, and where max_drift
    leaves none.
    """
    if not points:
        raise InputError("checkpoints", "there is none to choose from", "save and score at least one")
    for point in points:
        if not point.fidelity or len(point.fidelity) != len(points[0].fidelity):
            wrong = f"has {len(point.fidelity)} prompts, step {points[0].step} has {len(points[0].fidelity)}"
            raise InputError(f"step {point.step}", wrong, "score the same prompts at every step")
        if not all(map(math.isfinite, (*point.fidelity, point.drift))):
            raise InputError(f"step {point.step}", "has a score that is not finite", "score it again, or leave it out")
    within = [point for point in points if max_drift is None or point.drift <= max_drift]
    if not within:
        least = min(point.drift for point in points)
        raise InputError("max_drift", f"{max_drift} is below every step's drift, {least:.4g} at least", "allow more")
    best = max(within, key=lambda point: (point.mean, -point.step))
    return min((point for point in within if _as_good(point, best)), key=lambda point: (point.drift, point.step))


def _as_good(point: Point, best: Point) -> bool:
    short = [b - p for b, p in zip(best.fidelity, point.fidelity, strict=True)]
    n, mean = len(short), math.fsum(short) / len(short)
    error = math.sqrt(math.fsum((s - mean) ** 2 for s in short) / (n - 1) / n) if n > 1 else 0.0
    return mean <= error


def fidelity(stage: Path, photos: Sequence[Path], prompts: Sequence[int], backbone: Backbone,
             cache: Cache) -> tuple[float, ...]:  # fmt: skip
    """Of a stage's validation images (samples/step-000300, files <prompt>-<seed>.png): for each of `prompts`, by
    number, the mean cosine of its images' features to those of the subject's photos.

    Raises InputError where a prompt has no images there.
    """
    real, drawn = examine(photos), examine(listing(stage))
    features.embed([*real, *drawn], [backbone], cache)
    of_photos, found = features.matrix(real, backbone, cache), []
    for number in prompts:
        own = [picture for picture in drawn if picture.path.stem.partition("-")[0] == f"{number:02d}"]
        if not own:
            raise InputError(str(stage), f"has no image of prompt {number}", "draw the same prompts at every step")
        found.append(float((features.matrix(own, backbone, cache) @ of_photos.T).mean()))
    return tuple(found)
