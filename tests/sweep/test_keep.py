"""The checkpoint that is kept, on curves made to have one right answer."""

import math
import random

import pytest
import torch
from PIL import Image

from vislora.errors import InputError
from vislora.metrics.backbones import Backbone
from vislora.metrics.cache import Cache
from vislora.metrics.transforms import Transform
from vislora.sweep.keep import Point, fidelity, keep

NOISE = (0.03, -0.02, 0.01, -0.03, 0.02, -0.01)  # of prompts, the same at every step: they differ among themselves


def curve(values, drifts, wobble=0.0, seed=0):
    draw = random.Random(seed)
    return [Point(100 * (i + 1), tuple(v + n + wobble * draw.gauss(0, 1) for n in NOISE), d)
            for i, (v, d) in enumerate(zip(values, drifts, strict=True))]  # fmt: skip


def test_fidelity_that_still_rises_is_worth_its_drift():
    points = curve([0.3, 0.4, 0.5, 0.6], [0.1, 0.2, 0.3, 0.4], wobble=0.005)
    assert keep(points).step == 400


def test_a_plateau_is_entered_and_not_walked_along():
    """Fidelity saturates at step 300 up to noise, drift goes on: what comes after costs and gives nothing."""
    points = curve([0.3, 0.45, 0.6, 0.601, 0.6, 0.602], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], wobble=0.02)
    assert keep(points).step == 300


def test_errors_are_those_of_paired_differences():
    """Prompts spread over 0.3 would hide a gain of 0.05 that every prompt has; paired, it is certain."""
    spread = (0.2, 0.3, 0.4, 0.5, 0.35, 0.25)
    low = Point(100, spread, 0.1)
    high = Point(200, tuple(v + 0.05 + 0.001 * i for i, v in enumerate(spread)), 0.2)
    assert keep([low, high]).step == 200
    # The same mean gain on one prompt alone is as likely chance: error 0.05 for a shortfall of 0.05.
    lucky = Point(200, (*spread[:5], spread[5] + 0.3), 0.2)
    assert lucky.mean == pytest.approx(low.mean + 0.05) and keep([low, lucky]).step == 100


def test_fidelity_that_falls_again_is_left_at_its_top():
    assert keep(curve([0.3, 0.6, 0.5, 0.4], [0.1, 0.2, 0.3, 0.4])).step == 200


def test_drift_that_falls_while_fidelity_holds_moves_the_choice_on():
    assert keep(curve([0.6, 0.6, 0.6], [0.3, 0.2, 0.25])).step == 200


def test_of_equals_the_earliest():
    assert keep(curve([0.6, 0.6, 0.6], [0.2, 0.2, 0.2])).step == 100


def test_order_and_the_unit_of_drift_change_nothing():
    points = curve([0.3, 0.5, 0.59, 0.6, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5], wobble=0.02, seed=3)
    shuffled = random.Random(1).sample(points, len(points))
    scaled = [Point(p.step, p.fidelity, math.exp(3 * p.drift)) for p in points]
    assert keep(points).step == keep(shuffled).step == keep(scaled).step


def test_a_limit_on_drift_leaves_the_best_below_it():
    points = curve([0.3, 0.4, 0.5, 0.6], [0.1, 0.2, 0.3, 0.4])
    assert keep(points, max_drift=0.25).step == 200
    with pytest.raises(InputError, match="0.05 is below every step's drift, 0.1 at least"):
        keep(points, max_drift=0.05)


def test_one_prompt_has_no_error():
    assert keep([Point(1, (0.5,), 0.1), Point(2, (0.500001,), 0.9)]).step == 2


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([], "there is none to choose from"),
        ([Point(1, (0.5, 0.6), 0.1), Point(2, (0.5,), 0.1)], "step 2: has 1 prompts, step 1 has 2"),
        ([Point(1, (), 0.1)], "step 1: has 0 prompts"),
        ([Point(1, (0.5,), math.nan)], "step 1: has a score that is not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(points, said):
    with pytest.raises(InputError, match=said):
        keep(points)


class MeanColour(torch.nn.Module):
    """Features that can be told by hand: the mean of red, green and blue in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return self.one * batch.mean((2, 3))


def test_fidelity_is_the_mean_cosine_of_a_prompts_images_to_the_photos(tmp_path):
    def image(name, *colour):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
        return tmp_path / name

    photos = [image("photos/a.png", 255, 0, 0), image("photos/b.png", 0, 255, 0)]
    red, blue, yellow = (255, 0, 0), (0, 0, 255), (255, 255, 0)
    for name, colour in {"00-00": red, "00-01": blue, "01-00": blue, "10-00": yellow}.items():
        image(f"step-000300/{name}.png", *colour)
    backbone = Backbone("dino", "mean colour", MeanColour(), Transform(8, mean=(0, 0, 0), std=(1, 1, 1)))
    found = fidelity(tmp_path / "step-000300", photos, [0, 1, 10], backbone, Cache(None))
    # Red: cosines 1 and 0; blue: 0 and 0; yellow: 1 / sqrt(2) to both.
    assert found == pytest.approx(((0.5 + 0) / 2, 0, 1 / math.sqrt(2)), abs=1e-6)
    with pytest.raises(InputError, match="has no image of prompt 2"):
        fidelity(tmp_path / "step-000300", photos, [2], backbone, Cache(None))
