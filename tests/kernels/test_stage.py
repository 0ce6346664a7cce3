from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.config import Axis, Variant
from boneconv.dtypes import BF16, F16, F32
from boneconv.errors import ConfigError, NonFiniteError, ShapeError
from boneconv.kernels.stage import Stage, check_stage, fold_scale, rank_of, row_update


@pytest.mark.parametrize(
    ("variant", "axis", "block", "fits"),
    [
        (Variant.BONE, Axis.OUT, (3, 8), True),
        (Variant.BONE, Axis.OUT, (20, 8), True),  # a rank above `in` uses its first rows only
        (Variant.BONE, Axis.OUT, (3, 12), False),
        (Variant.BONE, Axis.OUT, (0, 8), False),
        (Variant.BONE, Axis.OUT, (8,), False),
        (Variant.MINI, Axis.OUT, (3, 4), True),
        (Variant.MINI, Axis.OUT, (3, 3), False),
        (Variant.BAT, Axis.OUT, (2, 4, 4), True),
        (Variant.BAT, Axis.IN, (2, 4, 4), False),
        (Variant.BAT, Axis.IN, (3, 4, 4), True),
        (Variant.BAT, Axis.OUT, (2, 4, 2), False),
        (Variant.BAT, Axis.OUT, (1, 8, 8), False),  # 8 does not divide 12
    ],
)
def test_shapes(variant: Variant, axis: Axis, block: tuple[int, ...], fits: bool) -> None:
    stage = Stage(variant, np.zeros(block, np.float32), axis)
    if fits:
        check_stage(stage, (8, 12))
        return
    with pytest.raises(ShapeError, match=r"\[8, 12\]"):
        check_stage(stage, (8, 12))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_block_must_be_finite(dtype: np.dtype, value: float) -> None:
    block = np.zeros((2, 8), dtype)
    block[1, 3] = value
    with pytest.raises(NonFiniteError, match=r"\(1, 3\)"):
        check_stage(Stage(Variant.BONE, block), (8, 12))


def test_the_scale_must_be_finite_and_the_dtype_known() -> None:
    block = np.zeros((2, 8), np.float32)
    with pytest.raises(ConfigError):
        check_stage(Stage(Variant.BONE, block, scale=float("nan")), (8, 12))
    with pytest.raises(ConfigError):
        check_stage(Stage(Variant.BONE, block.astype(np.int32)), (8, 12))


def test_rank() -> None:
    assert rank_of(Stage(Variant.BONE, np.zeros((3, 8)))) == 3
    assert rank_of(Stage(Variant.MINI, np.zeros((3, 4)))) == 3
    assert rank_of(Stage(Variant.BAT, np.zeros((2, 4, 4)))) == 4


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=4),
)
def test_a_scale_is_folded_only_where_that_is_exact(scale: float, numbers: list[float]) -> None:
    block = np.array([numbers], np.float32)
    folded = fold_scale(Stage(Variant.BONE, block, scale=scale))
    for before, after in zip(block.ravel(), folded.block.ravel(), strict=True):
        exact = Fraction(scale) * Fraction(float(before))
        assert Fraction(folded.scale) * Fraction(float(after)) == exact


def test_powers_of_two_fold() -> None:
    folded = fold_scale(Stage(Variant.BONE, np.array([[0.3, 0.7]], np.float32), scale=0.5))
    assert folded.scale == 1.0
    assert folded.block.dtype == np.float32


def test_row_updates() -> None:
    block = np.arange(6.0).reshape(2, 3)
    assert row_update(Stage(Variant.BONE, block), 1, 2).tolist() == [[1, 4], [2, 5]]
    assert row_update(Stage(Variant.MINI, block), 2, 2).tolist() == [[2, 5], [0, 3]]
