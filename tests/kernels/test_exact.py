from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.config import Axis, Variant
from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.kernels import Stage, exact


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_to_float64_is_the_identity(value: float) -> None:
    rounded = exact.round_fraction(Fraction(value), F64)
    assert rounded == value


@given(st.floats(-3e38, 3e38))
def test_rounding_to_float32_is_the_hardware_s(value: float) -> None:
    assert exact.round_fraction(Fraction(value), F32) == float(np.float32(value))


@given(st.floats(-65519, 65519))
def test_rounding_to_float16_is_numpy_s(value: float) -> None:
    assert exact.round_fraction(Fraction(value), F16) == float(np.float16(value))


@given(st.floats(-(2.0**127), 2.0**127, width=32))
def test_rounding_float32_to_bfloat16_is_that_of_ml_dtypes(value: float) -> None:
    assert exact.round_fraction(Fraction(value), BF16) == float(np.float32(value).astype(BF16))


def test_ties_go_to_even_and_the_least_excess_decides() -> None:
    tie = Fraction(1) + Fraction(1, 2**8)  # between 1 and 1 + 2**-7
    assert exact.round_fraction(tie, BF16) == 1.0
    assert exact.round_fraction(tie + Fraction(1, 2**500), BF16) == 1 + 2.0**-7
    assert exact.round_fraction(tie + Fraction(1, 2**7), BF16) == 1 + 2.0**-6


def test_a_double_rounding_would_be_wrong() -> None:
    value = 1 + 2.0**-8 + 2.0**-40  # float32 would round it to the bfloat16 midpoint
    assert float(np.float64(value).astype(np.float32).astype(BF16)) == 1.0
    assert exact.round_fraction(Fraction(value), BF16) == 1 + 2.0**-7


def test_zero_is_positive_and_underflow_keeps_the_sign() -> None:
    assert np.signbit(exact.round_fraction(Fraction(0), F16)) == 0
    assert np.signbit(exact.round_fraction(Fraction(-1, 2**60), F16)) == 1
    assert exact.round_fraction(Fraction(3, 2**25), F16) == 2.0**-23  # a subnormal tie


@pytest.mark.parametrize(
    ("dtype", "limit"), [(F16, 65520), (BF16, 2**128 - 2**119), (F32, 2**128 - 2**103)]
)
def test_overflow_begins_half_a_step_beyond_the_largest(dtype: np.dtype, limit: int) -> None:
    largest = float(np.finfo(np.float16).max) if dtype == F16 else None
    below = exact.round_fraction(Fraction(limit) - Fraction(1, 2), dtype)
    assert largest is None or below == largest
    with pytest.raises(OverflowError):
        exact.round_fraction(Fraction(limit), dtype)


def test_elements_by_hand() -> None:
    weight = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    bone = Stage(Variant.BONE, np.array([[10.0, 20.0]], np.float32), scale=0.5)
    assert exact.element(weight, 1, 0, [bone]) == 13
    block = np.array([[[1.0, 2.0], [3.0, 5.0]]], np.float32)
    bat = Stage(Variant.BAT, block)
    # W + W @ B + B = [[1+7+1, 2+12+2], [3+15+3, 4+26+5]]
    assert exact.merge(weight, [bat], F64).tolist() == [[9, 16], [21, 35]]
    assert exact.merge(weight, [Stage(Variant.BAT, block, Axis.IN)], F64).tolist() == [
        [9, 16],
        [21, 35],
    ]
    # in order: BAT of the Bone result [[6, 7], [13, 14]]
    assert exact.element(weight, 0, 1, [bone, bat]) == 7 + (6 * 2 + 7 * 5) + 2
    # rows may start anywhere in the weight
    assert exact.element(weight[1:], 0, 0, [bone], first_row=1) == 13
