from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from boneconv.config import Axis, Variant
from boneconv.dtypes import F64
from boneconv.errors import NonFiniteError, ShapeError
from boneconv.kernels import Stage, exact
from boneconv.kernels.reference import apply, delta
from tests.kernels.cases import merges


def test_bone_repeats_its_block_and_cuts_the_last_slice() -> None:
    block = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # [r = 3, out = 2]
    expected = [[1, 3, 5, 1, 3], [2, 4, 6, 2, 4]]
    assert delta(np.zeros((2, 5)), Stage(Variant.BONE, block)).tolist() == expected


def test_mini_repeats_along_both_axes() -> None:
    block = np.array([[1.0, 2.0], [3.0, 4.0]])  # [r = 2, mini_r = 2]
    expected = [[1, 3, 1], [2, 4, 2], [1, 3, 1], [2, 4, 2]]
    assert delta(np.zeros((4, 3)), Stage(Variant.MINI, block)).tolist() == expected


@pytest.mark.parametrize("axis", list(Axis))
def test_bat_is_written_out_tile_by_tile(axis: Axis) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((6, 4))
    block = rng.standard_normal((3 if axis is Axis.OUT else 2, 2, 2))
    expected = np.empty_like(weight)
    for a in range(3):
        for b in range(2):
            tile = weight[2 * a : 2 * a + 2, 2 * b : 2 * b + 2]
            factor = block[a if axis is Axis.OUT else b]
            expected[2 * a : 2 * a + 2, 2 * b : 2 * b + 2] = tile @ factor + factor
    np.testing.assert_allclose(delta(weight, Stage(Variant.BAT, block, axis)), expected, rtol=1e-14)


@given(merges())
@settings(max_examples=60)
def test_it_agrees_with_rational_arithmetic(case) -> None:
    weight, stages, _ = case
    try:
        expected = exact.merge(weight, stages, F64)
    except OverflowError:
        return
    with np.errstate(all="ignore"):
        scale = np.abs(apply(np.abs(weight.astype(F64)), [_magnitude(s) for s in stages]))
        error = np.abs(apply(weight, stages) - expected)
    finite = np.isfinite(scale) & np.isfinite(error)
    assert (error <= 1e-13 * scale + 1e-300)[finite].all()


def _magnitude(stage: Stage) -> Stage:
    return Stage(stage.variant, np.abs(stage.block.astype(F64)), stage.axis, abs(stage.scale))


def test_a_block_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[r, 4\].*\[2, 3\]"):
        delta(np.zeros((4, 4)), Stage(Variant.BONE, np.zeros((2, 3))))
    with pytest.raises(NonFiniteError, match=r"\(1, 2\)"):
        block = np.zeros((2, 4))
        block[1, 2] = np.nan
        delta(np.zeros((4, 4)), Stage(Variant.BONE, block))
