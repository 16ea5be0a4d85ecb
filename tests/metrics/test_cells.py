"""Reductions and intervals, against loops in float64; the real rows' identities on the papers' counts."""

from __future__ import annotations

import numpy as np
import pytest

from vislora.errors import InputError
from vislora.metrics.cells import Cells
from vislora.metrics.score import _add_real

COUNTS = [4] * 2 + [5] * 18 + [6] * 10  # photos of google/dreambooth's 30 subjects


def ragged():
    rng = np.random.default_rng(0)
    values = {(s, p): rng.normal(size=rng.integers(1, 5)) for s in "abc" for p in range(3 if s == "a" else 5)}
    cells = Cells()
    for (s, p), own in values.items():
        cells.add(s, p, own[:1])
        cells.add(s, p, own[1:])  # in two parts
    return values, cells


def test_reductions_are_the_means_that_they_say():
    values, cells = ragged()
    everything = np.concatenate(list(values.values()))
    assert cells.count == len(everything)
    assert cells.mean("flat") == pytest.approx(everything.mean(), abs=1e-12)
    by_subject = [np.concatenate([v for (s, _), v in values.items() if s == name]).mean() for name in "abc"]
    assert cells.mean("subject") == pytest.approx(np.mean(by_subject), abs=1e-12)
    by_prompt = [np.mean([v.mean() for (s, _), v in values.items() if s == name]) for name in "abc"]
    assert cells.mean("prompt") == pytest.approx(np.mean(by_prompt), abs=1e-12)
    assert list(cells.by(0).values()) == pytest.approx(by_subject)
    assert cells.by(1)["4"] == pytest.approx(np.concatenate([v for (_, p), v in values.items() if p == 4]).mean())
    with pytest.raises(InputError, match="median"):
        cells.mean("median")
    assert Cells().mean() is None and Cells().interval() is None


def test_intervals_hold_the_mean_and_narrow_with_more_prompts():
    rng = np.random.default_rng(1)

    def width(prompts: int) -> float:
        cells = Cells()
        for p in range(prompts):
            cells.add("one", p, rng.normal(size=4))
        low, high = cells.interval()
        assert low < cells.mean() < high
        return high - low

    wide, narrow = width(12), width(1200)
    assert narrow == pytest.approx(2 * 1.96 / np.sqrt(4 * 1200), rel=0.15)  # that of the mean of independent draws
    assert wide > 5 * narrow


@pytest.mark.parametrize("reduction", ["flat", "subject", "prompt"])
def test_the_interval_is_that_of_a_plain_bootstrap(reduction):
    values, cells = ragged()
    rng, means = np.random.default_rng(5), []
    for _ in range(4000):
        drawn = Cells()
        for i, s in enumerate(rng.choice(list("abc"), 3)):
            own = [p for t, p in values if t == s]
            for k, p in enumerate(rng.choice(own, len(own))):
                drawn.add(i, k, values[s, p])
        means.append(drawn.mean(reduction))
    low, high = np.quantile(means, [0.025, 0.975])
    assert cells.interval(reduction, 8000) == pytest.approx([low, high], abs=0.08 * (high - low))
    assert cells.interval(reduction) == cells.interval(reduction)  # a function of the seed


def test_one_cell_has_no_interval():
    cells = Cells()
    cells.add("a", "b", [1.0, 2.0])
    assert cells.interval() is None


def test_real_rows_have_the_papers_counts_and_identities():
    rng = np.random.default_rng(0)
    real = {"exclude_self": Cells(), "include_self": Cells()}
    for i, n in enumerate(COUNTS):
        x = rng.normal(size=(n, 16)) + 2 * rng.normal(size=16)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        _add_real(real, str(i), x @ x.T)
    without, within = real["exclude_self"], real["include_self"]
    assert (without.count, within.count) == (684, 842)
    assert within.mean("flat") == pytest.approx((684 * without.mean("flat") + 158) / 842, abs=1e-12)
    for i, n in enumerate(COUNTS):
        assert within.by(0)[str(i)] == pytest.approx(1 / n + (1 - 1 / n) * without.by(0)[str(i)], abs=1e-12)
    # The row of OFT becomes NB-LoRA's with the weight of self-pairs, the mean of 1/n over subjects.
    weight = np.mean([1 / n for n in COUNTS])
    assert weight == pytest.approx(0.1922, abs=1e-4)
    assert 0.703 + weight * (1 - 0.703) == pytest.approx(0.760, abs=5e-4)
    assert 0.864 + weight * (1 - 0.864) == pytest.approx(0.890, abs=5e-4)
    assert 0.695 * (1 - weight) == pytest.approx(0.562, abs=1e-3)
