"""Distances of answers, against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from boneconv.behaviour.measures import compare


def test_numbers_over_all_positions_of_all_inputs() -> None:
    reference = [np.zeros((2, 2)), np.zeros((1, 2))]
    other = [np.array([[1.0, -2.0], [0, 0]]), np.array([[0, 3.0]])]
    found = compare(reference, other, logits=False)
    assert found.rms == pytest.approx(math.sqrt((1 + 4 + 9) / 6))
    assert (found.max_abs, found.mean_abs) == (3.0, 1.0)
    assert (found.kl, found.top1) == (None, None)


def test_kl_and_top1_of_logits() -> None:
    reference, other = np.log([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]), np.log([[1, 2, 1], [1, 1, 2]])
    found = compare([reference], [other + 7.0], logits=True)
    p, q = np.exp(reference), np.array([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert found.top1 == 0.5


def test_equal_logits_diverge_by_nothing() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 50)) * 30
    found = compare([logits], [logits], logits=True)
    assert (found.rms, found.max_abs, found.kl, found.top1) == (0, 0, 0, 1)


def test_shapes_that_differ_are_refused_unless_columns_are_shared() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3\], not \[1, 2\]"):
        compare([np.zeros((1, 2))], [np.zeros((1, 3))], logits=False)
    found = compare([np.zeros((1, 2))], [np.array([[1.0, 1, 9]])], logits=False, shared=True)
    assert found.rms == 1


def test_what_is_not_finite_shows() -> None:
    found = compare([np.zeros((1, 2))], [np.array([[np.nan, 0]])], logits=True)
    assert math.isnan(found.rms)
    assert math.isnan(found.max_abs)
