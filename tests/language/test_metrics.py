"""GLUE's metrics against numpy, scipy and counts by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from vislora.language.metrics import accuracy, f1, matthews, pearson, spearman


def test_against_the_tables_of_two_classes():
    rng = random.Random(0)
    found, wanted = ([rng.randint(0, 1) for _ in range(50)] for _ in range(2))
    tp, fp, fn, tn = (sum((a, b) == pair for a, b in zip(found, wanted, strict=True))
                      for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))  # fmt: skip
    assert accuracy(found, wanted) == (tp + tn) / 50 and f1(found, wanted) == 2 * tp / (2 * tp + fp + fn)
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert math.isclose(matthews(found, wanted), mcc)
    assert matthews(found, wanted) == pytest.approx(np.corrcoef(found, wanted)[0, 1])


def test_correlations_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40).round(1).tolist(), rng.normal(size=40).round(1).tolist()  # with ties
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])


def test_where_nothing_varies():
    assert pearson([1, 1], [0, 1]) == matthews([1, 1], [0, 1]) == f1([0, 0], [0, 0]) == 0
